"""What each event about sandboxes, the policy and the host means to the state, and when pressure lasts."""

from __future__ import annotations

import pytest
from equipoise.policies.events import EventsLost, PolicyApplied, SandboxRegistered, SandboxRemoved, SandboxSampled
from equipoise.policies.model import CgroupId
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
        since[at_s] = state.apply(stepped(at_s, used_mib)).snapshot(ns(at_s)).pressure_since_ns
    assert since == {1: None, 2: ns(2), 3: ns(2), 4: None, 5: ns(5)}


def test_pressure_that_begins_at_time_zero_is_pressure() -> None:
    state = state_with_a_call(used_mib=1000)
    assert state.snapshot(0).pressure_since_ns == 0
    assert state.snapshot(ns(3)).pressure_since_ns == 0


def test_a_host_of_unknown_size_is_not_under_pressure() -> None:
    state = State().apply(SandboxRegistered(0, sandbox())).apply(started()).apply(stepped(0, 1000))
    assert state.snapshot(1).pressure_since_ns is None
