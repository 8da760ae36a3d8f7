"""What each event about engines and sessions means to the state."""

from __future__ import annotations

from dataclasses import replace

from equipoise.policies.accounting import SessionCost, TurnCost
from equipoise.policies.actions import SwapOut
from equipoise.policies.events import EngineAttached, EngineDetached, SandboxRegistered, SandboxRemoved, TurnPreempted
from equipoise.policies.model import (
    CgroupId,
    CostModel,
    EngineId,
    FinishReason,
    KvTier,
    Session,
    SessionId,
    SessionPhase,
    Verdict,
)
from equipoise.policies.state import State
from equipoise.tests.policies.facts import (
    ADA,
    ENGINE,
    decided,
    ended,
    engine,
    moved,
    ns,
    observed,
    sandbox,
    session,
    state_with_a_call,
    turn_ended,
    turn_started,
)

SWAP = SwapOut(ENGINE, ADA, KvTier.HOST, ns(9))
TURN = TurnCost(pte=10.0, wasted_pte=4.0, energy_joules=2.0, duration_ns=30, ideal_ns=10)


def ada(state: State) -> Session:
    return state.sessions[ADA]


def test_an_observation_is_the_whole_picture_of_its_engine() -> None:
    state = state_with_a_call().apply(EngineAttached(0, engine("e2")))
    state.apply(observed(1.0, session("other", engine=EngineId("e2")), engine="e2"))
    assert set(state.sessions) == {"gold/ada", "other"}
    state.apply(observed(2.0, session("new")))
    assert set(state.sessions) == {"new", "other"}


def test_an_observation_updates_the_engine_and_keeps_a_cost_it_does_not_tell() -> None:
    cost = CostModel(prefill_seconds_per_token=0.5)
    state = state_with_a_call().apply(observed(1.0, session(), device_used_tokens=7, waiting_count=3, cost=cost))
    state.apply(observed(2.0, session(), device_used_tokens=8))
    known = state.engines[ENGINE]
    assert (known.device_used_tokens, known.waiting_count, known.cost) == (8, 0, cost)
    assert known.observed_ns == ns(2)


def test_an_observation_by_an_unknown_engine_is_late() -> None:
    state = State().apply(observed(0.0, session()))
    assert not state.sessions and state.late_count == 1


def test_a_session_belongs_to_the_engine_that_reports_it() -> None:
    state = state_with_a_call().apply(observed(1.0, session("x", engine=EngineId("nobody"))))
    assert state.sessions[SessionId("x")].engine == ENGINE
    state.apply(ended(2.0)).check_integrity()


def test_what_the_engine_does_not_report_is_remembered() -> None:
    state = state_with_a_call().apply(turn_started(1.0)).apply(turn_ended(2.0)).apply(decided(SWAP, 3.0))
    state.apply(observed(4.0, session("gold/ada")))
    assert (ada(state).turn_count, ada(state).last_finish) == (1, FinishReason.TOOL_CALLS)
    assert (ada(state).verdict, ada(state).verdict_ns) == (Verdict.SWAP_HOST, ns(3))


def test_a_turn_is_running_from_its_start_to_its_end() -> None:
    state = state_with_a_call().apply(turn_started(1.0))
    assert ada(state).phase is SessionPhase.RUNNING
    assert state.apply(turn_ended(2.0)).sessions[ADA].phase is SessionPhase.IDLE


def test_a_turn_ends_the_verdict_of_the_last_tool_call() -> None:
    state = state_with_a_call().apply(decided(SWAP, 1.0)).apply(turn_started(2.0))
    assert (ada(state).verdict, ada(state).verdict_ns) == (None, 0)


def test_a_session_that_moved_is_in_its_new_tier_at_once() -> None:
    assert ada(state_with_a_call().apply(moved(1.0, KvTier.HOST))).tier is KvTier.HOST
    dropped = ada(state_with_a_call().apply(moved(1.0, KvTier.NONE)))
    assert (dropped.tier, dropped.held_tokens) == (KvTier.NONE, 0)


def test_a_preemption_waits_for_the_report_that_says_where_the_kv_is() -> None:
    state = state_with_a_call()
    before = ada(state)
    assert ada(state.apply(TurnPreempted(ns(1), ENGINE, ADA, "t1", KvTier.HOST, None))) == before


def test_a_detached_engine_takes_its_sessions_along() -> None:
    state = state_with_a_call().apply(observed(0.0, session("gold/ada"), host_used_bytes=5))
    state.apply(EngineDetached(ns(1), ENGINE))
    known = state.engines[ENGINE]
    assert not state.sessions
    assert (known.attached, known.device_used_tokens, known.host_used_bytes) == (False, 0, 0)
    state.check_integrity()


def test_a_session_is_never_less_than_what_it_holds() -> None:
    state = state_with_a_call().apply(observed(1.0, replace(session("x", held_tokens=9), context_tokens=3)))
    assert state.sessions[SessionId("x")].context_tokens == 9
    state.check_integrity()


# -- sessions whose sandbox is gone


def test_the_session_of_a_removed_sandbox_is_left_behind_until_somebody_uses_it() -> None:
    state = state_with_a_call().apply(SandboxRemoved(1, CgroupId(1)))
    assert state.snapshot(2).left_behind == {ADA}
    assert state.apply(turn_started(1.0)).snapshot(ns(1)).left_behind == frozenset()


def test_a_session_that_another_sandbox_uses_is_not_left_behind() -> None:
    state = state_with_a_call().apply(SandboxRegistered(0, replace(sandbox(2, name="bo"), session=ADA)))
    assert state.apply(SandboxRemoved(1, CgroupId(1))).snapshot(2).left_behind == frozenset()
    assert state.apply(SandboxRemoved(2, CgroupId(2))).snapshot(3).left_behind == {ADA}


def test_a_sandbox_that_comes_back_claims_its_session() -> None:
    state = state_with_a_call().apply(SandboxRemoved(1, CgroupId(1))).apply(SandboxRegistered(2, sandbox()))
    assert state.snapshot(3).left_behind == frozenset()


# -- what turns cost


def test_a_session_costs_the_sum_of_its_ended_turns_over_every_new_picture() -> None:
    state = state_with_a_call()
    assert ada(state).cost == SessionCost()
    state.apply(turn_started(1.0)).apply(turn_ended(2.0, cost=TURN))
    state.apply(observed(2.5, session("gold/ada")))
    state.apply(turn_started(3.0)).apply(turn_ended(4.0, cost=replace(TURN, pte=5.0)))
    cost = ada(state.apply(observed(4.5, session("gold/ada")))).cost
    assert (cost.turn_count, cost.pte, cost.wasted_pte, cost.energy_joules) == (2, 15.0, 8.0, 4.0)
    assert cost.slowdown_ratio == 3.0


def test_a_turn_that_ends_before_the_first_picture_of_its_session_is_not_forgotten() -> None:
    state = State().apply(EngineAttached(0, engine()))
    state.apply(turn_started(1.0)).apply(turn_ended(2.0, cost=TURN)).apply(turn_ended(2.1, cost=TURN))
    assert ada(state.apply(observed(2.5, session("gold/ada")))).cost.pte == 20.0
    assert ada(state.apply(turn_ended(3.0, cost=TURN))).cost.pte == 30.0
    assert ada(state.apply(observed(3.5, session("gold/ada")))).cost.pte == 30.0


def test_the_cost_of_a_session_that_the_next_picture_lacks_is_forgotten() -> None:
    state = State().apply(EngineAttached(0, engine()))
    state.apply(turn_ended(2.0, cost=TURN)).apply(observed(2.5))
    assert ada(state.apply(observed(3.0, session("gold/ada")))).cost == SessionCost()
    assert not state._early_costs


def test_costs_told_early_go_with_their_engine_and_those_of_an_unknown_one_are_not_kept() -> None:
    state = State().apply(turn_ended(1.0, cost=TURN))
    assert not state._early_costs
    state.apply(EngineAttached(2, engine())).apply(turn_ended(2.0, cost=TURN)).apply(EngineDetached(ns(3), ENGINE))
    assert not state._early_costs


def test_a_turn_of_an_engine_that_measures_nothing_leaves_the_sums_unknown_and_not_zero() -> None:
    state = state_with_a_call()
    cost = ada(state.apply(turn_ended(2.0))).cost
    assert (cost.turn_count, cost.pte, cost.energy_joules, cost.slowdown_ratio) == (1, None, None, None)
