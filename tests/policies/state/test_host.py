"""What each event about sandboxes, the policy and the host means to the state, and when pressure lasts."""

from __future__ import annotations

import pytest
from equipoise.policies.events import (
    EventsLost,
    HostSampled,
    PolicyApplied,
    SandboxRegistered,
    SandboxRemoved,
    SandboxSampled,
)
from equipoise.policies.model import MIB, CgroupId
from equipoise.policies.policy import LadderRule, Measure, Rung
from equipoise.policies.state import State
from equipoise.tests.policies.facts import (
    host_sampled,
    ns,
    observed,
    policy,
    sandbox,
    session,
    started,
    state_with_a_call,
    stepped,
)


def test_a_sandbox_is_known_until_it_is_removed() -> None:
    state = State().apply(SandboxRegistered(0, sandbox()))
    assert state.snapshot(0).sandboxes == (sandbox(),)
    state.apply(SandboxRemoved(1, CgroupId(1)))
    assert state.snapshot(1).sandboxes == ()


def test_a_sample_updates_the_sandbox_and_keeps_its_highest_peak() -> None:
    state = State().apply(SandboxRegistered(0, sandbox()))
    state.apply(SandboxSampled(1, CgroupId(1), memory_bytes=50, peak_bytes=90, cpu_ns=7))
    state.apply(SandboxSampled(2, CgroupId(1), memory_bytes=60, peak_bytes=10, cpu_ns=8))
    seen = state.sandboxes[CgroupId(1)]
    assert (seen.memory_bytes, seen.peak_bytes, seen.cpu_ns) == (60, 90, 8)


def test_a_policy_that_is_applied_brings_its_tenants() -> None:
    state = State().apply(PolicyApplied(0, policy(tenants={"silver": 2.0})))
    assert [(t.id, t.weight) for t in state.snapshot(0).tenants] == [("silver", 2.0)]


def test_the_host_is_as_last_sampled() -> None:
    state = State().apply(host_sampled(1.0, total_mib=100, available_mib=40))
    assert state.snapshot(ns(1)).host.used_ratio == pytest.approx(0.6)
    assert state.snapshot(ns(1)).host.observed_ns == ns(1)


def test_memory_and_kv_are_correlated_with_each_host_sample() -> None:
    state = state_with_a_call()
    for step in range(1, 5):
        state.apply(stepped(step, 100 * step))
        state.apply(observed(step, session("gold/ada", held_tokens=100 * step)))
        state.apply(host_sampled(step))
    assert state.covariance.correlation == pytest.approx(1.0, abs=0.2)


def test_lost_events_are_counted() -> None:
    assert State().apply(EventsLost(0, "ring", 3)).apply(EventsLost(1, "ring", 4)).lost_count == 7


# -- pressure


def test_pressure_lasts_from_above_the_upper_mark_to_below_the_lower_one() -> None:
    state = state_with_a_call()  # pool of 1024 MiB, marks at 0.9 and 0.8
    since = {}
    for at_s, used_mib in ((1, 900), (2, 950), (3, 850), (4, 810), (5, 930)):
        since[at_s] = state.apply(stepped(at_s, used_mib)).snapshot(ns(at_s)).pressed
    (rule,) = state.policy.memory.ladder
    assert since == {1: (), 2: ((rule, ns(2)),), 3: ((rule, ns(2)),), 4: (), 5: ((rule, ns(5)),)}


def test_pressure_that_begins_at_time_zero_is_pressure() -> None:
    state = state_with_a_call(used_mib=1000)
    (rule,) = state.policy.memory.ladder
    assert state.snapshot(0).pressed == ((rule, 0),)
    assert state.snapshot(ns(3)).pressed == ((rule, 0),)


def test_a_host_of_unknown_size_is_not_under_pressure() -> None:
    state = State().apply(SandboxRegistered(0, sandbox())).apply(started()).apply(stepped(0, 1000))
    assert state.snapshot(1).pressed == ()


def test_each_rule_of_the_ladder_has_its_own_measure_marks_and_time() -> None:
    pool = LadderRule(above_ratio=0.9, below_ratio=0.8)
    used = LadderRule(Measure.HOST_MEMORY, above_ratio=0.5, below_ratio=0.4, rung=Rung.FREEZE)
    waits = LadderRule(Measure.MEMORY_PRESSURE, above_ratio=0.2, below_ratio=0.1)
    state = state_with_a_call(used_mib=950)
    state.apply(PolicyApplied(0, policy(ladder=(pool, used, waits))))
    state.apply(HostSampled(0, 1024 * MIB, 400 * MIB, None, None))
    assert state.snapshot(1).pressed == ((pool, 1), (used, 1)), "what is not measured never presses"
    state.apply(HostSampled(2, 1024 * MIB, 1000 * MIB, 0.15, None))
    assert state.snapshot(2).pressed == ((pool, 1),), "0.15 is not above 0.2"
    state.apply(HostSampled(3, 1024 * MIB, 1000 * MIB, 0.25, None))
    assert state.snapshot(3).pressed == ((pool, 1), (waits, 3))
    state.apply(HostSampled(4, 1024 * MIB, 1000 * MIB, 0.15, None))
    assert state.snapshot(4).pressed == ((pool, 1), (waits, 3)), "until it is below 0.1"


def test_a_rule_that_a_new_policy_does_not_have_presses_no_more() -> None:
    state = state_with_a_call(used_mib=950)
    assert state.snapshot(1).pressed
    assert state.apply(PolicyApplied(2, policy(ladder=()))).snapshot(2).pressed == ()
