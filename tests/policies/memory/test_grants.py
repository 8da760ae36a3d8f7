"""Grants in an order in which all can end: nobody stands half-grown for ever beside another that does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.actions import Grant, Kill, Wait
from equipoise.policies.memory.grants import (
    UNASKED_LEAST_BYTES,
    Books,
    claim_bytes,
    entry_budget,
    leader,
    service_order,
)
from equipoise.policies.memory.ladder import climb
from equipoise.policies.model import MIB, NS_PER_S, TenantId, ToolCall, ToolCallId, ToolCallPhase
from equipoise.policies.policy import Budget, Policy
from equipoise.tests.policies.facts import call, learned, ns, policy, snapshot, stopped
from hypothesis import given, settings
from hypothesis import strategies as st

TIGHT = replace(
    policy(
        pool_mib=500,
        budget=Budget(96 * MIB, 128 * MIB),
        max_bytes=500 * MIB,
        step_bytes=64 * MIB,
        wait_ns=20 * NS_PER_S,
    )
)
RANK = {TenantId("gold"): 0, TenantId("silver"): 1}
TICK_NS = NS_PER_S // 20


# -- the parts


def test_a_call_is_predicted_to_reach_what_it_announced_else_what_its_kind_does_beyond_what_it_has() -> None:
    now = snapshot(1.0, TIGHT, estimates=learned(100))
    assert claim_bytes(call(used_mib=100, expected_bytes=300 * MIB), now, TIGHT, 500 * MIB) == 300 * MIB
    assert claim_bytes(call(used_mib=400, expected_bytes=300 * MIB), now, TIGHT, 500 * MIB) == 500 * MIB
    small = claim_bytes(call(used_mib=1), now, TIGHT, 500 * MIB)
    large = claim_bytes(call(used_mib=200), now, TIGHT, 500 * MIB)
    assert small < 200 * MIB < 400 * MIB < large <= 500 * MIB


def test_of_a_kind_that_is_not_well_known_a_call_may_reach_whatever_it_can_be_granted() -> None:
    now = snapshot(1.0, TIGHT, estimates=learned(60, count=19))
    assert claim_bytes(call(used_mib=1), now, TIGHT, 500 * MIB) == 500 * MIB
    assert claim_bytes(call(used_mib=1, expected_bytes=80 * MIB), now, TIGHT, 500 * MIB) == 80 * MIB
    known = snapshot(1.0, TIGHT, estimates=learned(60, count=20))
    assert claim_bytes(call(used_mib=1), known, TIGHT, 500 * MIB) < 200 * MIB


def test_beyond_all_that_was_seen_a_call_is_predicted_to_double() -> None:
    now = snapshot(1.0, TIGHT, estimates=learned(100))
    assert claim_bytes(call(used_mib=1024), now, policy(pool_mib=9000, max_bytes=1 << 40), 9000 * MIB) == 2048 * MIB


def test_who_was_granted_something_is_served_on_and_the_oldest_of_those_first() -> None:
    fresh, later = stopped(1, "gold", used_mib=50), call(2, "silver", granted_ns=ns(2), start_s=1.0)
    oldest = call(3, "silver", granted_ns=ns(3), start_s=0.5)
    ordered = sorted((fresh, later, oldest), key=lambda c: service_order(c, RANK))
    assert [c.id for c in ordered] == [3, 2, 1]
    assert leader((fresh, later, oldest), RANK) is oldest
    assert leader((call(4), replace(oldest, gone_ns=ns(4))), RANK) is None


def test_a_grant_is_safe_where_all_get_through_in_some_order_and_not_where_none_does() -> None:
    one, two = (call(i, used_mib=100, expected_bytes=300 * MIB) for i in (1, 2))
    books = Books((one, two), snapshot(1.0, TIGHT), TIGHT, 500 * MIB)
    assert books.is_safe(one, 164 * MIB, 236 * MIB), "136 more for the first, then all it held for the second"
    assert not books.is_safe(one, 164 * MIB, 135 * MIB), "neither gets its 136 or 200"
    books.granted(one, 164 * MIB)
    assert books.is_safe(two, 164 * MIB, 172 * MIB) and not books.is_safe(two, 164 * MIB, 128 * MIB)


def test_what_was_granted_long_ago_and_not_used_is_neither_held_nor_given_back() -> None:
    """The pool counts it as free, so a call that needs it yet needs it out of what is free."""
    early = call(1, used_mib=100, hard_mib=290, granted_ns=ns(0), expected_bytes=300 * MIB)
    other = call(2, used_mib=100, expected_bytes=300 * MIB)
    lately, later = (Books((early, other), snapshot(s, TIGHT), TIGHT, 500 * MIB) for s in (0.5, 2.0))
    assert lately.is_safe(other, 164 * MIB, 36 * MIB), "it lacks 10 beyond its promise, and gives 290 back"
    assert not later.is_safe(other, 164 * MIB, 136 * MIB - 1), "the one lacks 200, the other 136"


def test_what_calls_may_take_unasked_is_a_quarter_of_the_pool_shared_among_those_who_may() -> None:
    budget = Budget(384 * MIB, 512 * MIB)
    assert entry_budget(budget, 12 << 30, 6) == budget
    assert entry_budget(budget, 12 << 30, 24) == Budget(96 * MIB, 128 * MIB)
    assert entry_budget(budget, 4 << 30, 1000).hard_bytes == UNASKED_LEAST_BYTES
    assert entry_budget(budget, 500 * MIB, 6) == budget, "above a third of the pool"
    assert entry_budget(budget, 0, 6) == budget, "a host that is not known yet"


# -- in time


class Pool:
    """Calls that grow steadily to their peaks, stay there for a second and end; every decision is carried out."""

    def __init__(self, of: Policy, peaks_mib: list[int], rate_mib_s: float = 200.0) -> None:
        self.of, self.rate = of, rate_mib_s * MIB / NS_PER_S
        entry = entry_budget(of.memory.budget, of.memory.pool_bytes(0), len(peaks_mib))
        self.peaks = {ToolCallId(n): mib * MIB for n, mib in enumerate(peaks_mib, 1)}
        self.calls: dict[ToolCallId, ToolCall] = {
            id: call(id, ("gold", "silver")[id % 2], used_mib=0, hard_mib=entry.hard_bytes // MIB) for id in self.peaks
        }
        self.full_ns: dict[ToolCallId, int] = {}
        self.killed: list[ToolCallId] = []
        self.now_ns = 0

    def run(self, at_most_s: float) -> float:
        """Seconds until all have ended."""
        while self.calls and self.now_ns < at_most_s * NS_PER_S:
            self.now_ns += TICK_NS
            for id in list(self.calls):
                self._grow(id)
            used = sum(c.used_bytes for c in self.calls.values())
            assert used <= self.of.memory.pool_bytes(0), "the pool is overdrawn"
            now = snapshot(self.now_ns / NS_PER_S, self.of, tool_calls=tuple(self.calls.values()))
            for step in climb(now, self.of):
                self._carry_out(step.call.id, step.action)
        assert not self.calls, f"{self.calls} did not end"
        return self.now_ns / NS_PER_S

    def _grow(self, id: ToolCallId) -> None:
        known = self.calls[id]
        if known.stopped_ns is not None:
            return
        used = min(self.peaks[id], known.hard_bytes, known.used_bytes + int(self.rate * TICK_NS))
        known = replace(known, used_bytes=used, peak_bytes=used)
        if used == self.peaks[id]:
            if self.now_ns - self.full_ns.setdefault(id, self.now_ns) >= NS_PER_S:
                del self.calls[id]
                return
        elif used == known.hard_bytes:
            known = replace(known, stopped_ns=self.now_ns, phase=ToolCallPhase.STOPPED, phase_since_ns=self.now_ns)
        self.calls[id] = known

    def _carry_out(self, id: ToolCallId, action: object) -> None:
        known = self.calls[id]
        match action:
            case Grant(hard_bytes=hard):
                known = replace(known, hard_bytes=hard, granted_ns=self.now_ns, stopped_ns=None, waiting_until_ns=None)
                self.calls[id] = replace(known, phase=ToolCallPhase.RUNNING, phase_since_ns=self.now_ns)
            case Wait(expires_ns=until):
                self.calls[id] = replace(known, waiting_until_ns=until)
            case Kill():
                self.killed.append(id)
                del self.calls[id]
            case _:
                pass


@pytest.mark.parametrize("count", [2, 3, 4])
def test_calls_that_fit_one_after_another_all_end_in_less_than_twice_the_serial_time(count: int) -> None:
    pool = Pool(TIGHT, [300] * count)
    took_s = pool.run(at_most_s=60)
    assert pool.killed == []
    assert took_s < 2 * count * (300 / 200 + 1)


@given(st.lists(st.integers(20, 300), min_size=4, max_size=8), st.sampled_from([50.0, 200.0, 2000.0]))
@settings(deadline=None, max_examples=60)
def test_of_any_mix_in_which_each_fits_beside_what_the_others_began_with_nobody_is_killed(
    peaks_mib: list[int], rate: float
) -> None:
    patient = replace(TIGHT, memory=replace(TIGHT.memory, wait_ns=300 * NS_PER_S))
    pool = Pool(patient, peaks_mib, rate)
    serial_s = sum(peak / rate + 1 for peak in peaks_mib)
    assert pool.run(at_most_s=600) < 2 * serial_s + 1
    assert pool.killed == []


def test_in_a_pool_with_room_for_all_they_grow_side_by_side() -> None:
    roomy = replace(TIGHT, memory=replace(TIGHT.memory, tool_pool_bytes=8000 * MIB))
    assert Pool(roomy, [300] * 4).run(at_most_s=60) < 2 * (300 / 200 + 1)


def test_a_call_that_does_not_end_keeps_nobody_waiting_for_more_than_half_the_longest_wait() -> None:
    server = call(1, "gold", used_mib=200, hard_mib=256, granted_ns=0)
    asks = stopped(2, "silver", used_mib=64, hard_mib=64)
    early, late = (climb(snapshot(s, TIGHT, tool_calls=(server, asks)), TIGHT) for s in (1.0, 10.0))
    assert isinstance(early[0].action, Wait) and "others go first" in early[0].rule
    assert isinstance(late[0].action, Grant)
