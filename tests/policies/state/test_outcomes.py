"""What a decision means to the state, and what comes of it: holds, verdicts, weights."""

from __future__ import annotations

import pytest
from equipoise.policies.actions import (
    Drop,
    Freeze,
    Grant,
    Kill,
    OutcomeStatus,
    Retain,
    SetTenantWeight,
    SwapIn,
    SwapOut,
    Thaw,
    Throttle,
    Wait,
)
from equipoise.policies.events import EngineAttached, EngineDetached
from equipoise.policies.model import MIB, KvTier, Session, SessionId, TenantId, ToolCallId, ToolCallPhase, Verdict
from equipoise.policies.state import State
from equipoise.tests.policies.facts import (
    ADA,
    ENGINE,
    came_of_it,
    carry_out,
    decided,
    ended,
    engine,
    ns,
    reached,
    started,
    state_with_a_call,
    the_call,
)

CALL = ToolCallId(1)
SWAP = SwapOut(ENGINE, ADA, KvTier.HOST, ns(9))


# -- tool calls that are held back, let go and ended


def test_a_grant_lets_the_call_go_on_under_its_new_budget() -> None:
    state = state_with_a_call().apply(reached(1.0))
    carry_out(state, Grant(CALL, 600 * MIB, 768 * MIB), at_s=3.0)
    call = the_call(state)
    assert (call.phase, call.stopped_ns, call.stalled_ns) == (ToolCallPhase.RUNNING, None, ns(2))
    assert (call.soft_bytes, call.hard_bytes, call.granted_ns) == (600 * MIB, 768 * MIB, ns(3))


def test_waiting_is_remembered_until_the_call_is_answered() -> None:
    state = state_with_a_call().apply(reached(1.0)).apply(decided(Wait(CALL, MIB, ns(21)), 1.0))
    assert the_call(state).waiting_until_ns == ns(21)
    carry_out(state, Grant(CALL, 1, 2), at_s=2.0, id="d2")
    assert the_call(state).waiting_until_ns is None


def test_a_throttle_is_in_force_from_its_outcome_to_its_expiry() -> None:
    state = state_with_a_call().apply(decided(Throttle(CALL, MIB, 0.2, ns(6)), 1.0))
    assert the_call(state).phase is ToolCallPhase.RUNNING
    state.apply(came_of_it(OutcomeStatus.COMPLETED, 1.1))
    assert the_call(state).phase is ToolCallPhase.THROTTLED
    state.apply(came_of_it(OutcomeStatus.EXPIRED, 6.1))
    assert the_call(state).phase is ToolCallPhase.RUNNING
    assert the_call(state).stalled_ns == ns(5)


def test_a_thaw_undoes_a_freeze() -> None:
    state = state_with_a_call()
    carry_out(state, Freeze(CALL, ns(9)), at_s=1.0)
    assert the_call(state).phase is ToolCallPhase.FROZEN
    carry_out(state, Thaw(CALL), at_s=2.0, id="d2")
    assert the_call(state).phase is ToolCallPhase.RUNNING


def test_a_throttle_that_comes_true_too_late_does_not_hide_a_stop() -> None:
    state = state_with_a_call().apply(decided(Throttle(CALL, MIB, 0.2, ns(6)), 1.0))
    state.apply(reached(1.05)).apply(came_of_it(OutcomeStatus.COMPLETED, 1.1))
    assert the_call(state).phase is ToolCallPhase.STOPPED
    state.apply(came_of_it(OutcomeStatus.EXPIRED, 6.0))
    assert the_call(state).phase is ToolCallPhase.STOPPED


@pytest.mark.parametrize("action", [Grant(CALL, 1, 2), Thaw(CALL), Throttle(CALL, 1, 0.2, ns(9)), Freeze(CALL, ns(9))])
def test_nothing_brings_a_killed_call_back(action: Grant | Thaw | Throttle | Freeze) -> None:
    state = state_with_a_call()
    carry_out(state, Kill(CALL, "because"), at_s=1.0)
    carry_out(state, action, at_s=1.1, id="d2")
    state.apply(reached(1.2))
    assert the_call(state).phase is ToolCallPhase.KILLED
    assert state.apply(ended(1.3, exit_code=None, signal=9)).tool_calls[CALL].phase is ToolCallPhase.ENDED


def test_a_kill_that_found_nobody_left_counts_as_done() -> None:
    state = state_with_a_call().apply(reached(1.0)).apply(decided(Kill(CALL, "because"), 1.1))
    state.apply(came_of_it(OutcomeStatus.GONE, 1.2))
    assert the_call(state).phase is ToolCallPhase.KILLED


@pytest.mark.parametrize("action", [Thaw(CALL), Grant(CALL, 1, 2)])
def test_letting_go_what_is_held_no_more_is_not_asked_again(action: Thaw | Grant) -> None:
    state = state_with_a_call()
    carry_out(state, Throttle(CALL, MIB, 0.2, ns(6)), at_s=1.0)
    if isinstance(action, Grant):
        state.apply(reached(1.05))
    state.apply(decided(action, 1.1, "d2")).apply(came_of_it(OutcomeStatus.GONE, 1.2, "d2"))
    assert (the_call(state).phase, the_call(state).stopped_ns) == (ToolCallPhase.RUNNING, None)
    assert the_call(state).hard_bytes == 512 * MIB


def test_a_kill_that_failed_leaves_the_call_standing() -> None:
    state = state_with_a_call().apply(reached(1.0)).apply(decided(Kill(CALL, "because"), 1.1))
    state.apply(came_of_it(OutcomeStatus.FAILED, 1.2))
    assert the_call(state).phase is ToolCallPhase.STOPPED


# -- verdicts


def ada(state: State) -> Session:
    return state.sessions[ADA]


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        (SWAP, Verdict.SWAP_HOST),
        (SwapOut(ENGINE, ADA, KvTier.DISK, ns(9)), Verdict.SWAP_DISK),
        (Retain(ENGINE, ADA, ns(5), ns(9)), Verdict.KEEP),
        (Drop(ENGINE, ADA, 0, ns(9)), Verdict.DROP),
    ],
)
def test_a_decision_is_the_verdict_on_session_and_call(action: SwapOut | Retain | Drop, verdict: Verdict) -> None:
    state = state_with_a_call().apply(decided(action, 1.0))
    assert (ada(state).verdict, ada(state).verdict_ns, the_call(state).verdict) == (verdict, ns(1), verdict)


def test_a_call_nothing_was_asked_for_kept_its_kv() -> None:
    assert the_call(state_with_a_call().apply(ended(1.0))).verdict is Verdict.KEEP


def test_bringing_kv_back_leaves_the_record_of_the_call_alone() -> None:
    state = state_with_a_call().apply(decided(SWAP, 1.0)).apply(ended(2.0))
    state.apply(decided(SwapIn(ENGINE, ADA, ns(9)), 2.1, "d2"))
    assert (ada(state).verdict, the_call(state).verdict) == (Verdict.KEEP, Verdict.SWAP_HOST)


@pytest.mark.parametrize("status", [OutcomeStatus.REJECTED, OutcomeStatus.EXPIRED, OutcomeStatus.FAILED])
def test_a_verdict_the_engine_did_not_follow_is_taken_back(status: OutcomeStatus) -> None:
    state = state_with_a_call().apply(decided(SWAP, 1.0)).apply(came_of_it(status, 1.5))
    assert (ada(state).verdict, ada(state).verdict_ns) == (None, ns(1)), "it is still known when it was asked"
    assert the_call(state.apply(ended(2.0))).verdict is Verdict.KEEP


def test_a_late_refusal_of_an_older_verdict_changes_nothing() -> None:
    state = state_with_a_call().apply(decided(SWAP, 1.0, "d1"))
    state.apply(decided(Retain(ENGINE, ADA, ns(5), ns(9)), 4.0, "d2"))
    state.apply(came_of_it(OutcomeStatus.EXPIRED, 5.0, "d1"))
    assert ada(state).verdict is Verdict.KEEP


def test_a_verdict_does_not_reach_calls_of_other_sessions() -> None:
    state = state_with_a_call().apply(started(0.0, id=2, session=SessionId("other")))
    state.apply(decided(SWAP, 1.0))
    assert the_call(state, 2).verdict is None


# -- tenant weights


def told(state: State) -> frozenset[tuple[str, str, float]]:
    return frozenset(state.snapshot(0).weights_told)


def tell(weight: float, id: str = "d1") -> SetTenantWeight:
    return SetTenantWeight(ENGINE, TenantId("gold"), weight, ns(9))


def test_a_weight_is_told_from_the_decision_on_and_not_when_it_failed() -> None:
    state = state_with_a_call().apply(decided(tell(2.0)))
    assert told(state) == {(ENGINE, "gold", 2.0)}
    assert told(state.apply(came_of_it(OutcomeStatus.REJECTED))) == frozenset()


def test_only_the_last_weight_told_is_known_to_the_engine() -> None:
    state = state_with_a_call()
    for number, weight in enumerate((1.0, 2.0, 1.0)):
        state.apply(decided(tell(weight), id=f"d{number}"))
        assert told(state) == {(ENGINE, "gold", weight)}


@pytest.mark.parametrize("leaves_first", [True, False])
def test_an_engine_that_attaches_again_knows_no_weights(leaves_first: bool) -> None:
    state = state_with_a_call().apply(decided(tell(2.0)))
    if leaves_first:
        state.apply(EngineDetached(1, ENGINE))
    assert told(state.apply(EngineAttached(2, engine()))) == frozenset()
