"""What the kernel tells of a call beside its life and its memory is kept with it."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.policies.events import ToolCallFact, ToolCallMerged
from equipoise.policies.model import Fact, ToolCallId
from equipoise.policies.state.facts import _told
from equipoise.tests.policies.facts import ended, ns, started, state_with_a_call, the_call


@dataclass(frozen=True, slots=True)
class Bitten(ToolCallFact):
    by: str

    @property
    def words(self) -> str:
        return f"bitten by {self.by}"


@dataclass(frozen=True, slots=True)
class Stung(ToolCallFact):
    @property
    def words(self) -> str:
        return "stung"


def test_the_newest_of_each_kind_is_kept_in_the_order_they_happened() -> None:
    state = state_with_a_call()
    for event in (Bitten(1, ToolCallId(1), "fox"), Stung(2, ToolCallId(1)), Bitten(3, ToolCallId(1), "dog")):
        _told(state, event)
    assert the_call(state).facts == (Fact("Stung", 2, "stung"), Fact("Bitten", 3, "bitten by dog"))


def test_a_fact_of_a_call_that_has_ended_is_kept_and_one_of_a_stranger_counted_as_late() -> None:
    state = state_with_a_call()
    state.apply(ended(1.0))
    late = state.late_count
    _told(state, Stung(ns(2), ToolCallId(1)))
    _told(state, Stung(ns(2), ToolCallId(99)))
    assert [fact.kind for fact in the_call(state).facts] == ["Stung"]
    assert state.late_count == late + 1


def test_what_happens_to_a_wrapper_is_not_told_of_the_call_it_wraps() -> None:
    state = state_with_a_call(pid=5)
    state.apply(started(1.0, id=2, pid=6)).apply(ToolCallMerged(ns(1), ToolCallId(1), ToolCallId(2)))
    _told(state, Stung(ns(2), ToolCallId(1)))
    assert the_call(state, 2).facts == ()
