"""What a daemon asks, step by step over the fake runner: effects, times and refusals of each directive."""

from __future__ import annotations

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.directives import OutcomeStatus, PreemptMode
from equipoise.gpuctl.engine.schedule.sequence import SessionId, SessionPhase, TenantId, Tier
from equipoise.gpuctl.engine.tiers.table import HOST
from equipoise.gpuctl.reports import TurnPreempted
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven, holding, host_tokens, moved, swap_out

S = SessionId


def test_a_directive_is_applied_once_per_id_and_answered_the_same_again():
    driven = Driven()
    driven.complete("a", "hello")
    driven.direct(swap_out(driven, "a"))
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    assert len([m for m in moved(driven) if m.to_tier is KvTier.HOST]) == 1
    statuses = [outcome.status for outcome in driven.outcomes("out")]
    assert statuses == [OutcomeStatus.ACCEPTED, OutcomeStatus.COMPLETED, OutcomeStatus.COMPLETED]


def test_a_directive_past_its_deadline_is_not_applied():
    driven = Driven()
    driven.complete("a", "hello")
    directive = swap_out(driven, "a")
    driven.advance(2)
    assert driven.direct(directive).status is OutcomeStatus.EXPIRED
    assert holding(driven, "a").device_tokens > 0


def test_swapping_out_a_running_session_waits_for_the_turns_end():
    driven = Driven()
    driven.turn("a", "hello", tokens=10)
    driven.steps(3)
    assert driven.direct(swap_out(driven, "a")).status is OutcomeStatus.DEFERRED
    driven.settle()
    driven.settle()
    assert driven.outcomes("out")[-1].status is OutcomeStatus.COMPLETED
    assert holding(driven, "a").longest()[0] is HOST


def test_a_held_session_waits_until_released_or_expired():
    driven = Driven()
    hold = ask.Hold(directive_id="h", deadline_ns=driven.now_ns + SECOND, session_id=S("a"), ttl_ns=5 * SECOND)
    turn = driven.turn("a", "hello", tokens=10)
    driven.steps(3)
    driven.direct(hold)
    driven.steps(20)
    assert turn.end is None
    assert driven.engine._scheduler.phase(driven.engine._scheduler.sessions[S("a")]) is SessionPhase.HELD
    driven.advance(6)
    driven.settle()
    assert turn.text == driven.runner.expected_output("hello", 10)


def test_losing_the_daemon_ends_every_hold():
    driven = Driven()
    turn = driven.turn("a", "hello", tokens=10)
    driven.steps(2)
    driven.direct(
        ask.Hold(directive_id="h", deadline_ns=driven.now_ns + SECOND, session_id=S("a"), ttl_ns=3000 * SECOND)
    )
    driven.engine.release_holds()
    driven.settle()
    assert turn.end is not None


@pytest.mark.parametrize("mode", list(PreemptMode))
def test_a_preempted_turn_goes_on_with_the_same_tokens(mode):
    driven = Driven()
    turn = driven.turn("a", "hello", tokens=10)
    driven.steps(4)
    outcome = driven.direct(
        ask.Preempt(directive_id="p", deadline_ns=driven.now_ns + SECOND, session_id=S("a"), mode=mode)
    )
    assert outcome.status is OutcomeStatus.ACCEPTED
    driven.settle()
    assert driven.outcomes("p")[-1].status is OutcomeStatus.COMPLETED
    assert [r for r in driven.reports if isinstance(r.report, TurnPreempted)]
    assert turn.text == driven.runner.expected_output("hello", 10)
    assert turn.end is not None
    assert (turn.end.recomputed_tokens > 0) == (mode is PreemptMode.RECOMPUTE)


def test_a_retained_session_stays_under_pressure_until_its_time_is_up():
    driven = Driven(kv_tokens=80)
    driven.complete("kept", "x" * 30)
    driven.direct(
        ask.Retain(directive_id="r", deadline_ns=driven.now_ns + SECOND, session_id=S("kept"), ttl_ns=10 * SECOND)
    )
    driven.advance(1)
    driven.complete("other", "y" * 20)
    driven.complete("third", "z" * 20)
    assert holding(driven, "kept").longest()[0] is Tier.DEVICE
    assert holding(driven, "other").longest()[0] is HOST
    driven.advance(60)
    driven.complete("fourth", "w" * 45)
    assert holding(driven, "kept").longest()[0] is HOST


def test_a_turn_that_fits_only_without_the_retained_one_still_runs_when_alone():
    driven = Driven(kv_tokens=60)
    driven.complete("kept", "x" * 30)
    driven.direct(
        ask.Retain(directive_id="r", deadline_ns=driven.now_ns + SECOND, session_id=S("kept"), ttl_ns=10 * SECOND)
    )
    turn = driven.complete("big", "y" * 50)
    assert turn.text == driven.runner.expected_output("y" * 50, 5)


def test_dropping_from_a_token_keeps_what_lies_before():
    driven = Driven()
    first = driven.complete("a", "hello world")
    outcome = driven.direct(
        ask.Drop(directive_id="d", deadline_ns=driven.now_ns + SECOND, session_id=S("a"), from_token=6)
    )
    assert outcome.status is OutcomeStatus.COMPLETED
    driven.settle()
    assert holding(driven, "a").device_tokens == 6
    again = driven.complete("a", "hello world" + first.text)
    assert again.end is not None
    assert again.end.cached_tokens == 6
    assert again.end.recomputed_tokens == 15 - 6
    assert again.text == driven.runner.expected_output("hello world" + first.text, 5)


def test_prefetching_brings_a_session_back_before_its_turn():
    driven = Driven()
    first = driven.complete("a", "hello")
    driven.direct(swap_out(driven, "a"))
    driven.direct(ask.SwapIn(directive_id="in", deadline_ns=driven.now_ns + SECOND, session_id=S("a")))
    driven.settle()
    assert driven.outcomes("in")[-1].status is OutcomeStatus.COMPLETED
    assert holding(driven, "a").device_tokens == 9
    turn = driven.complete("a", "hello" + first.text)
    assert turn.text == driven.runner.expected_output("hello" + first.text, 5)


def test_a_prefetch_without_room_is_put_off_until_its_deadline():
    driven = Driven(kv_tokens=60)
    driven.complete("a", "x" * 30)
    driven.direct(swap_out(driven, "a"))
    driven.complete("b", "y" * 40)
    outcome = driven.direct(ask.SwapIn(directive_id="in", deadline_ns=driven.now_ns + SECOND, session_id=S("a")))
    assert outcome.status is OutcomeStatus.DEFERRED
    driven.advance(2)
    driven.steps(1)
    assert driven.outcomes("in")[-1].status is OutcomeStatus.EXPIRED


def test_a_lowered_capacity_evicts_and_is_clipped_to_what_exists():
    driven = Driven(kv_tokens=200)
    driven.complete("a", "x" * 50)
    driven.complete("b", "y" * 50)
    outcome = driven.direct(ask.SetCapacity(directive_id="c", deadline_ns=driven.now_ns + SECOND, device_tokens=70))
    assert outcome.status is OutcomeStatus.COMPLETED
    driven.settle()
    assert driven.engine._ledger.device_used_tokens <= 70
    outcome = driven.direct(ask.SetCapacity(directive_id="d", deadline_ns=driven.now_ns + SECOND, device_tokens=10**9))
    assert outcome.status is OutcomeStatus.CLIPPED
    assert driven.engine._ledger.device_capacity_tokens == driven.runner.physical_tokens


def test_a_shrunk_host_tier_lets_go_of_what_no_longer_fits():
    driven = Driven(kv_tokens=1000)
    driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a"))
    driven.direct(ask.SetHostTierCapacity(directive_id="h", deadline_ns=driven.now_ns + SECOND, host_bytes=0))
    driven.settle()
    assert driven.engine._ledger.used_bytes(KvTier.HOST) == 0
    assert host_tokens(driven, "a") == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e9])
def test_a_weight_out_of_range_is_rejected_with_the_range(weight):
    driven = Driven()
    outcome = driven.direct(
        ask.SetTenantWeight(
            directive_id="w", deadline_ns=driven.now_ns + SECOND, tenant_id=TenantId("t"), weight=weight
        )
    )
    assert outcome.status is OutcomeStatus.REJECTED
    assert "1000" in outcome.reason


def test_a_directive_for_an_unknown_session_is_rejected_by_name():
    driven = Driven()
    outcome = driven.direct(swap_out(driven, "nobody"))
    assert outcome.status is OutcomeStatus.REJECTED
    assert "nobody" in outcome.reason
