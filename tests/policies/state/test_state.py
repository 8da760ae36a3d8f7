"""What holds for every event: the table covers them all, the unknown does no harm, what leaves is frozen."""

from __future__ import annotations

from inspect import signature
from typing import get_args

from equipoise.policies.actions import OutcomeStatus
from equipoise.policies.events import BudgetChanged, Event, ProcessesGone, SandboxSampled, ToolCallFact
from equipoise.policies.model import MIB, CgroupId, TenantId, ToolCallId
from equipoise.policies.state import State, facts, host, outcomes, sessions, tool_calls
from equipoise.policies.state.state import ARMS
from equipoise.tests.policies.facts import came_of_it, ended, ns, observed, reached, state_with_a_call, stepped

CALL = ToolCallId(1)


def test_the_table_has_an_arm_for_every_event_there_is_and_no_other() -> None:
    assert set(ARMS) == set(get_args(Event))


def test_no_event_has_its_meaning_in_two_files() -> None:
    contributed = [kind for part in (tool_calls, facts, sessions, outcomes, host) for kind, _ in part.ARMS]
    assert len(contributed) == len(set(contributed))


def test_every_arm_takes_the_event_it_stands_for() -> None:
    for kind, does in ARMS.items():
        _, event = signature(does, eval_str=True).parameters.values()
        assert event.annotation is kind or (kind.__base__ is event.annotation is ToolCallFact)


def test_events_about_the_unknown_are_counted_and_do_no_harm() -> None:
    state = State()
    strangers: list[Event] = [
        stepped(0, 1),
        reached(0),
        ended(0),
        ProcessesGone(0, CALL),
        BudgetChanged(0, CALL, 1, 2),
        SandboxSampled(0, CgroupId(5), 1, 1, 1),
        came_of_it(OutcomeStatus.COMPLETED),
        observed(0.0),
    ]
    for event in strangers:
        state.apply(event)
    assert state.late_count >= len(strangers)
    assert not state.tool_calls
    state.check_integrity()


def test_a_snapshot_does_not_change_with_the_state() -> None:
    state = state_with_a_call(used_mib=10)
    before = state.snapshot(ns(1))
    state.apply(stepped(2.0, 99)).apply(ended(3.0))
    assert before.tool_calls[0].used_bytes == 10 * MIB
    assert before.weight(TenantId("gold")) == 1.0
