"""What each event about tool calls means to the state."""

from __future__ import annotations

import pytest
from equipoise.policies.actions import Grant, Kill, Wait
from equipoise.policies.events import (
    BudgetChanged,
    BudgetLevel,
    EngineAttached,
    IntentDeclared,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallAttributed,
    ToolCallMerged,
    ToolCallWithdrawn,
)
from equipoise.policies.model import MIB, CgroupId, SessionId, ToolCallId, ToolCallPhase, ToolCallSource
from equipoise.policies.state import REMEMBER_NS, State
from equipoise.tests.policies.facts import (
    carry_out,
    decided,
    ended,
    engine,
    ns,
    observed,
    policy,
    reached,
    sandbox,
    session,
    started,
    state_with_a_call,
    stepped,
    the_call,
)

CALL = ToolCallId(1)


# -- the life of a tool call


def test_a_call_takes_tenant_session_and_kind_from_its_sandbox_and_command() -> None:
    call = the_call(state_with_a_call(command="timeout 5 pytest -q"))
    assert (call.tenant, call.session, call.kind) == ("gold", "gold/ada", "pytest")
    assert call.phase is ToolCallPhase.RUNNING and call.running


def test_a_call_may_name_its_own_session() -> None:
    assert the_call(state_with_a_call(session=SessionId("other"))).session == "other"


def test_a_call_in_an_unknown_sandbox_is_late() -> None:
    state = State().apply(started(0.0, cgroup=9))
    assert not state.tool_calls and state.late_count == 1


def test_a_call_told_twice_stays_as_it_was_told_first() -> None:
    state = state_with_a_call().apply(started(5.0, command="other"))
    assert the_call(state).command == "pytest -q" and len(state.tool_calls) == 1


def test_an_intent_is_used_once_by_the_next_call_of_its_kind() -> None:
    state = State(policy()).apply(SandboxRegistered(0, sandbox()))
    state.apply(IntentDeclared(0, CgroupId(1), "pytest", 7 * MIB, ns(3)))
    state.apply(started(1.0, id=1, command="git status"))
    state.apply(started(1.0, id=2, command="pytest"))
    state.apply(started(2.0, id=3, command="pytest"))
    assert [the_call(state, each).expected_bytes for each in (1, 2, 3)] == [None, 7 * MIB, None]
    assert the_call(state, 2).expected_ns == ns(3)


def test_the_intents_of_a_removed_sandbox_are_forgotten() -> None:
    state = State(policy()).apply(SandboxRegistered(0, sandbox()))
    state.apply(IntentDeclared(0, CgroupId(1), "pytest", 7 * MIB, None))
    state.apply(SandboxRemoved(1, CgroupId(1))).apply(SandboxRegistered(2, sandbox())).apply(started(3.0))
    assert the_call(state).expected_bytes is None


def test_memory_follows_the_steps_and_the_peak_is_never_lowered() -> None:
    state = state_with_a_call().apply(stepped(1.0, 50)).apply(stepped(2.0, 30))
    call = the_call(state)
    assert (call.used_bytes, call.peak_bytes, call.peak_ns) == (30 * MIB, 50 * MIB, ns(1))


def test_the_kv_held_at_the_peak_is_remembered() -> None:
    state = state_with_a_call().apply(stepped(1.0, 50))
    state.apply(observed(2.0, session("gold/ada", held_tokens=10))).apply(stepped(3.0, 20))
    assert the_call(state).kv.at_peak_bytes == 1000 * 1024


def test_a_call_too_short_for_a_step_peaks_at_its_end() -> None:
    state = state_with_a_call().apply(ended(0.01, peak_bytes=5 * MIB))
    call = the_call(state)
    assert (call.peak_bytes, call.peak_ns, call.kv.at_peak_bytes) == (5 * MIB, ns(0.01), 1000 * 1024)


def test_the_end_keeps_what_was_seen_and_adds_what_it_tells() -> None:
    state = state_with_a_call(used_mib=50).apply(ended(2.0, exit_code=3, peak_bytes=60 * MIB))
    call = the_call(state)
    assert (call.phase, call.end_ns, call.gone_ns) == (ToolCallPhase.ENDED, ns(2), ns(2))
    assert (call.exit_code, call.signal, call.peak_bytes, call.used_bytes) == (3, None, 60 * MIB, 0)


def test_a_second_end_changes_nothing() -> None:
    state = state_with_a_call().apply(ended(2.0, exit_code=0)).apply(ended(3.0, exit_code=1))
    assert (the_call(state).end_ns, the_call(state).exit_code) == (ns(2), 0)


def test_an_end_before_the_start_is_put_at_the_start() -> None:
    state = State(policy()).apply(SandboxRegistered(0, sandbox())).apply(started(5.0)).apply(ended(4.0))
    assert the_call(state).end_ns == ns(5)
    state.check_integrity()


def test_an_escapee_keeps_its_memory_on_the_books_until_it_is_gone() -> None:
    state = state_with_a_call(used_mib=80).apply(ended(2.0, escaped_count=1))
    assert the_call(state).gone_ns is None
    assert state.snapshot(ns(2)).tool_used_bytes() == 80 * MIB
    state.apply(ProcessesGone(ns(9), CALL))
    assert the_call(state).gone_ns == ns(9)
    assert state.snapshot(ns(9)).tool_used_bytes() == 0


def test_memory_told_after_the_last_process_has_gone_is_not_counted() -> None:
    state = state_with_a_call(used_mib=80).apply(ended(2.0)).apply(stepped(2.1, 70))
    assert state.snapshot(ns(3)).tool_used_bytes() == 0


def test_how_a_call_ended_is_taken_from_whoever_says_it_first_though_it_was_seen_gone_before() -> None:
    state = state_with_a_call(used_mib=80).apply(ended(2.0, exit_code=None))
    assert (the_call(state).exit_code, the_call(state).end_ns) == (None, ns(2))
    for told in (6, 7):
        state.apply(ended(2.6, exit_code=told))
        assert (the_call(state).exit_code, the_call(state).end_ns) == (6, ns(2))
    assert state.estimates.durations["pytest"].total == 1.0


def test_estimates_learn_from_a_call_that_ended() -> None:
    state = state_with_a_call(used_mib=80).apply(ended(4.0))
    assert state.estimates.durations["pytest"].total == 1.0
    assert state.estimates.durations["pytest"].quantile(1.0) == float(1 << 32)  # 4 s lie in [2^31, 2^32) ns
    assert state.estimates.peaks["pytest"].quantile(1.0) == 128 * MIB


def test_estimates_do_not_count_time_in_which_we_held_the_call_back() -> None:
    state = state_with_a_call(used_mib=80)
    state.apply(reached(1.0))
    carry_out(state, Grant(CALL, 1, 768 * MIB), at_s=9.0)
    state.apply(ended(10.0))
    assert the_call(state).stalled_ns == ns(8)
    assert state.estimates.durations["pytest"].quantile(1.0) == float(1 << 31)  # 2 s of work


def test_estimates_do_not_learn_from_a_call_we_killed() -> None:
    state = state_with_a_call(used_mib=80)
    carry_out(state, Kill(CALL, "because"), at_s=1.0)
    state.apply(ended(1.1, exit_code=None, signal=9))
    assert "pytest" not in state.estimates.durations


def test_a_finished_call_is_forgotten_after_a_while() -> None:
    state = state_with_a_call().apply(ended(1.0))
    assert state.snapshot(ns(1) + REMEMBER_NS).tool_calls
    assert state.snapshot(ns(1) + REMEMBER_NS + 1).tool_calls == ()


def test_a_call_with_escapees_is_not_forgotten() -> None:
    state = state_with_a_call().apply(ended(1.0, escaped_count=1))
    assert state.snapshot(10 * REMEMBER_NS).tool_calls


# -- who says what it is


def test_a_wrapper_knows_better_than_the_kernel() -> None:
    state = state_with_a_call()
    state.apply(ToolCallAttributed(1, CALL, ToolCallSource.WRAPPER, 1.0, "make -j2", SessionId("s9")))
    call = the_call(state)
    assert (call.source, call.confidence, call.kind, call.session) == (ToolCallSource.WRAPPER, 1.0, "make", "s9")


def test_the_kernel_does_not_overrule_a_wrapper() -> None:
    state = state_with_a_call(source=ToolCallSource.WRAPPER)
    state.apply(ToolCallAttributed(1, CALL, ToolCallSource.LINEAGE, 0.5, "other"))
    assert the_call(state).command == "pytest -q"


def merged(announced_s: float, seen_s: float) -> State:
    """Call 7, announced by a hook, merged into call 2, which the kernel saw."""
    state = State(policy()).apply(SandboxRegistered(0, sandbox()))
    for event in sorted(
        [
            started(announced_s, id=7, command="pytest -q", source=ToolCallSource.HOOK, confidence=0.95, pid=None),
            started(seen_s, id=2, command="/bin/bash -c snapshot"),
        ],
        key=lambda e: e.at_ns,
    ):
        state.apply(event)
    return state.apply(ToolCallMerged(ns(2), ToolCallId(7), ToolCallId(2)))


def test_a_merged_call_has_the_hooks_words_and_the_kernels_processes() -> None:
    state = merged(announced_s=0.0, seen_s=1.0)
    assert list(state.tool_calls) == [2]
    call = the_call(state, 2)
    assert (call.source, call.command, call.kind, call.start_ns) == (ToolCallSource.HOOK, "pytest -q", "pytest", 0)
    assert (call.pid, call.confidence) == (4002, 0.95)


def test_after_a_merge_both_ids_mean_the_same_call() -> None:
    state = merged(announced_s=0.0, seen_s=1.0)
    assert state.resolve(ToolCallId(7)) == 2
    state.apply(ended(3.0, id=7))
    assert the_call(state, 2).end_ns == ns(3)
    state.check_integrity()


def test_a_chain_of_merges_still_resolves() -> None:
    state = merged(announced_s=0.0, seen_s=1.0).apply(started(1.5, id=3, command="x"))
    state.apply(ToolCallMerged(ns(2), ToolCallId(2), ToolCallId(3)))
    assert state.resolve(ToolCallId(7)) == state.resolve(ToolCallId(2)) == 3
    state.check_integrity()


@pytest.mark.parametrize(("announced_s", "seen_s"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_merge_charges_the_kv_of_the_whole_call_once(announced_s: float, seen_s: float) -> None:
    state = State(policy()).apply(SandboxRegistered(0, sandbox())).apply(EngineAttached(0, engine()))
    state.apply(observed(0.0, session("gold/ada", held_tokens=1)))
    hook = started(announced_s, id=7, source=ToolCallSource.HOOK, pid=None)
    for event in sorted([hook, started(seen_s, id=2)], key=lambda e: e.at_ns):
        state.apply(event)
    state.apply(ToolCallMerged(ns(1.5), ToolCallId(7), ToolCallId(2)))
    state.apply(ended(4.0, id=2))
    assert the_call(state, 2).kv.idle_byte_seconds == pytest.approx(4 * 1024)


def wrapped() -> State:
    """Call 1 is the wrapper as the kernel saw it, merged into call 2, which it started."""
    state = state_with_a_call(command="equipoise tool -- pytest -q")
    state.apply(started(0.2, id=2, source=ToolCallSource.WRAPPER, confidence=1.0))
    return state.apply(ToolCallMerged(ns(0.2), ToolCallId(1), ToolCallId(2)))


def test_a_wrapper_that_was_seen_first_does_not_weaken_what_it_wraps() -> None:
    call = the_call(wrapped(), 2)
    assert (call.source, call.kind, call.confidence) == (ToolCallSource.WRAPPER, "pytest", 1.0)


def test_what_the_kernel_says_of_a_wrappers_own_process_is_not_about_its_call() -> None:
    state = wrapped().apply(stepped(1.0, 300, id=2))
    state.apply(stepped(1.1, 5, id=1))
    assert the_call(state, 2).used_bytes == 300 * MIB
    state.apply(ended(2.0, id=2, escaped_count=1))
    state.apply(ended(2.1, id=1)).apply(ProcessesGone(ns(2.1), ToolCallId(1)))
    assert the_call(state, 2).gone_ns is None, "an escapee of the call lives on"


def test_a_merge_with_the_unknown_changes_nothing() -> None:
    state = state_with_a_call().apply(ToolCallMerged(1, CALL, ToolCallId(9)))
    assert list(state.tool_calls) == [CALL]
    state.apply(ToolCallMerged(1, CALL, CALL))
    assert list(state.tool_calls) == [CALL]


def test_a_call_that_is_withdrawn_is_forgotten_with_every_name_it_had() -> None:
    state = wrapped()
    state.apply(ToolCallWithdrawn(ns(1), ToolCallId(2)))
    assert state.tool_calls == {} and state.resolve(ToolCallId(1)) == 1
    state.check_integrity()
    state.apply(ended(2.0, id=2)).apply(ToolCallWithdrawn(ns(2), ToolCallId(2)))
    assert state.tool_calls == {}


# -- budgets


def test_a_soft_budget_is_only_a_notice() -> None:
    state = state_with_a_call().apply(reached(1.0, used_mib=384, budget_mib=384, level=BudgetLevel.SOFT))
    assert the_call(state).phase is ToolCallPhase.RUNNING
    assert the_call(state).peak_bytes == 384 * MIB


def test_a_call_at_its_hard_budget_stands_stopped_with_its_overshoot() -> None:
    state = state_with_a_call().apply(reached(1.0, used_mib=513))
    call = the_call(state)
    assert (call.phase, call.stopped_ns, call.overshoot_bytes) == (ToolCallPhase.STOPPED, ns(1), MIB)


def test_a_budget_that_only_the_kernel_knew_is_learned_when_it_stops_a_call() -> None:
    state = State(policy()).apply(SandboxRegistered(0, sandbox())).apply(started()).apply(reached(1.0))
    assert the_call(state).hard_bytes == 512 * MIB


def test_the_largest_overshoot_is_kept_and_the_first_stop_counts() -> None:
    state = state_with_a_call().apply(reached(1.0, used_mib=514)).apply(reached(2.0, used_mib=513))
    assert (the_call(state).overshoot_bytes, the_call(state).stopped_ns) == (2 * MIB, ns(1))


def test_a_budget_can_change_without_a_stop() -> None:
    state = state_with_a_call().apply(BudgetChanged(1, CALL, 1, 2))
    assert (the_call(state).soft_bytes, the_call(state).hard_bytes) == (1, 2)


def test_a_call_that_stood_at_a_budget_goes_on_when_it_has_none_any_more() -> None:
    state = state_with_a_call().apply(reached(1.0)).apply(decided(Wait(CALL, MIB, ns(21)), 1.0))
    state.apply(BudgetChanged(ns(3), CALL, 0, 0))
    call = the_call(state)
    assert (call.phase, call.stopped_ns, call.waiting_until_ns) == (ToolCallPhase.RUNNING, None, None)
    assert call.stalled_ns == ns(2)
    state.check_integrity()


def test_an_escapee_that_is_stopped_stands_though_its_call_has_ended() -> None:
    state = state_with_a_call(used_mib=100).apply(ended(1.0, escaped_count=1)).apply(reached(2.0))
    call = the_call(state)
    assert (call.phase, call.stopped_ns) == (ToolCallPhase.ENDED, ns(2))
    carry_out(state, Grant(CALL, 1, 768 * MIB), at_s=3.0)
    assert (the_call(state).phase, the_call(state).stopped_ns) == (ToolCallPhase.ENDED, None)


def test_a_stopped_call_that_is_gone_no_longer_stands() -> None:
    state = state_with_a_call().apply(reached(1.0)).apply(ended(2.0, exit_code=None, signal=9))
    assert the_call(state).stopped_ns is None
    assert the_call(state).stalled_ns == ns(1)
