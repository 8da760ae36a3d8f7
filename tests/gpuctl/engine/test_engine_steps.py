"""The engine above a runner that only counts: turns, reuse, eviction, preemption, directives."""

from __future__ import annotations

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.directives import OutcomeStatus, PreemptMode
from equipoise.gpuctl.engine.schedule.sequence import FinishReason, IdlePolicy, SessionId, SessionPhase, TenantId, Tier
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.reports import SessionMoved, TurnEnded, TurnPreempted, TurnStarted
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven

S = SessionId


def swap_out(driven: Driven, session: str, tier: Tier = Tier.HOST, name: str = "out") -> ask.SwapOut:
    return ask.SwapOut(directive_id=name, deadline_ns=driven.now_ns + SECOND, session_id=S(session), tier=tier)


def holding(driven: Driven, session: str):
    return driven.engine._ledger.holding(S(session))


def moved(driven: Driven) -> list[SessionMoved]:
    return [r.report for r in driven.reports if isinstance(r.report, SessionMoved)]


# Turns


def test_a_turn_produces_what_the_model_says_and_counts_it():
    driven = Driven()
    turn = driven.complete("a", "hello", tokens=7)
    assert turn.text == driven.runner.expected_output("hello", 7)
    assert turn.end is not None
    assert (turn.end.prompt_tokens, turn.end.output_tokens, turn.end.cached_tokens) == (5, 7, 0)
    assert turn.end.reason is FinishReason.LENGTH
    assert driven.engine.totals.prefill_tokens == 5
    assert driven.engine.totals.decode_tokens == 7


def test_the_next_turn_of_a_session_computes_only_what_is_new():
    driven = Driven()
    first = driven.complete("a", "hello", tokens=4)
    second = driven.complete("a", "hello" + first.text + " and more", tokens=4)
    assert second.end is not None
    assert second.end.cached_tokens == 5 + 3  # the last output was sampled but never computed
    assert second.text == driven.runner.expected_output("hello" + first.text + " and more", 4)


def test_a_prompt_that_departs_from_the_conversation_reuses_only_the_common_part():
    driven = Driven()
    driven.complete("a", "hello world", tokens=4)
    second = driven.complete("a", "hello there", tokens=4)
    assert second.end is not None
    assert second.end.cached_tokens == len("hello ")
    assert second.text == driven.runner.expected_output("hello there", 4)


def test_the_same_prompt_again_still_computes_its_last_token():
    driven = Driven()
    first = driven.complete("a", "hello", tokens=3)
    second = driven.complete("a", "hello", tokens=3)
    assert second.text == first.text
    assert second.end is not None
    assert second.end.cached_tokens == 4


def test_turns_of_one_session_run_one_after_the_other():
    driven = Driven()
    first = driven.turn("a", "hello", tokens=3)
    second = driven.turn("a", "hello", tokens=3)
    driven.settle()
    assert first.text == second.text == driven.runner.expected_output("hello", 3)


def test_a_turn_without_a_session_leaves_nothing_behind():
    driven = Driven()
    driven.complete("once-1", "hello", ephemeral=True)
    driven.settle()
    assert driven.engine._ledger.device_used_tokens == 0
    assert not driven.engine._scheduler.sessions


def test_a_prompt_longer_than_the_context_is_refused_with_its_length():
    driven = Driven(kv_tokens=100)
    turn = driven.turn("a", "x" * 100)
    driven.settle()
    assert turn.refusal is not None
    assert turn.refusal.error.code == "context_length_exceeded"
    assert "100" in str(turn.refusal.error)


def test_output_is_cut_where_the_context_ends():
    driven = Driven(kv_tokens=20)
    turn = driven.complete("a", "x" * 15, tokens=50)
    assert turn.end is not None
    assert turn.end.output_tokens == 5


def test_a_session_of_another_tenant_is_refused():
    driven = Driven()
    driven.complete("a", "hello", tenant="blue")
    turn = driven.turn("a", "hello", tenant="red")
    driven.settle()
    assert turn.refusal is not None
    assert turn.refusal.error.status == 403


def test_a_full_queue_refuses_with_retry_after():
    driven = Driven(kv_tokens=50, max_queued_turns=2)
    for number in range(2):
        driven.turn(f"s{number}", "x" * 40, tokens=5)
    driven.steps(1)
    driven.turn("third", "x" * 40, tokens=5)
    refused = driven.turn("late", "x" * 40, tokens=5)
    driven.steps(1)
    assert refused.refusal is not None
    assert refused.refusal.error.status == 429
    assert refused.refusal.error.retry_after_s


def test_a_cancelled_turn_ends_and_frees_its_sampler():
    driven = Driven()
    turn = driven.turn("a", "hello", tokens=100)
    driven.steps(5)
    assert turn.id is not None
    driven.engine.cancel(turn.id)
    driven.settle()
    assert turn.end is not None
    assert turn.end.reason is FinishReason.CANCELLED
    assert all(sampler.closed for sampler in driven.runner.samplers)


def test_a_stop_string_ends_the_text_before_it():
    driven = Driven()
    whole = driven.runner.expected_output("hello", 20)
    turn = driven.complete("a", "hello", tokens=20, stop=(whole[6:8],))
    assert turn.text == whole[: whole.index(whole[6:8])]
    assert turn.end is not None
    assert turn.end.reason is FinishReason.STOP


def test_a_turn_told_to_wait_for_a_tool_is_reported_so():
    driven = Driven()
    driven.complete("a", "hello", awaits_tool=True)
    ended = [r.report for r in driven.reports if isinstance(r.report, TurnEnded)]
    assert ended[0].finish_reason is FinishReason.TOOL_CALLS


# Memory


def test_idle_sessions_leave_for_the_host_when_room_is_needed():
    driven = Driven(kv_tokens=60)
    driven.complete("old", "x" * 30)
    driven.advance(1)
    driven.complete("new", "y" * 40)
    assert holding(driven, "old").longest()[0] is Tier.HOST
    assert holding(driven, "new").longest()[0] is Tier.DEVICE


def test_the_session_whose_retention_ends_first_leaves_first():
    driven = Driven(kv_tokens=70)
    driven.complete("first", "x" * 25)
    driven.advance(1)
    driven.complete("second", "y" * 25)
    driven.advance(1)
    driven.complete("third", "z" * 10)
    assert holding(driven, "first").longest()[0] is Tier.HOST
    assert holding(driven, "second").longest()[0] is Tier.DEVICE


def test_without_room_on_the_host_a_session_is_dropped_and_computed_again():
    driven = Driven(kv_tokens=60, host_tokens=0)
    first = driven.complete("old", "x" * 30)
    driven.complete("new", "y" * 40)
    assert holding(driven, "old").longest() == (Tier.NONE, 0)
    again = driven.complete("old", "x" * 30 + first.text + "more")
    assert again.text == driven.runner.expected_output("x" * 30 + first.text + "more", 5)
    assert again.end is not None
    assert again.end.cached_tokens == 0
    assert again.end.recomputed_tokens == 34


def test_a_second_swap_out_copies_only_what_was_appended():
    driven = Driven(kv_tokens=1000)
    first = driven.complete("a", "x" * 200)
    driven.direct(swap_out(driven, "a"))
    assert driven.runner.taken_tokens == 204
    driven.complete("a", "x" * 200 + first.text + "more")
    driven.direct(swap_out(driven, "a", name="again"))
    assert driven.runner.taken_tokens == 204 + 9
    assert moved(driven)[-1].tokens == 213


def test_copies_the_device_also_holds_give_way_on_a_full_host():
    driven = Driven(kv_tokens=1000, host_tokens=60)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a"))
    driven.complete("a", "x" * 50 + first.text)
    driven.complete("b", "y" * 50)
    assert driven.direct(swap_out(driven, "b", name="b out")).status is OutcomeStatus.ACCEPTED
    driven.settle()
    assert holding(driven, "a").host_tokens == 0
    assert holding(driven, "a").device_tokens > 50
    assert holding(driven, "b").host_tokens > 50


def test_a_swapped_session_resumes_with_the_tokens_of_an_undisturbed_run():
    driven = Driven()
    first = driven.complete("a", "hello", tokens=6)
    driven.direct(swap_out(driven, "a"))
    second = driven.complete("a", "hello" + first.text + "tool says 42", tokens=6)
    assert second.text == driven.runner.expected_output("hello" + first.text + "tool says 42", 6)
    assert second.end is not None
    assert second.end.recomputed_tokens == 0


def test_running_turns_that_outgrow_the_capacity_are_preempted_and_still_right():
    driven = Driven(kv_tokens=100, max_running=8)
    # The recent turns were short, so Past-Future admits more than will fit.
    for number in range(20):
        driven.complete(f"short{number}", "s", tokens=1, ephemeral=True)
    turns = [driven.turn(f"s{n}", chr(97 + n) * 20, tokens=40) for n in range(4)]
    driven.settle()
    assert driven.engine.totals.preempted_count > 0
    for number, turn in enumerate(turns):
        assert turn.text == driven.runner.expected_output(chr(97 + number) * 20, 40)


def test_with_whole_outputs_reserved_nobody_is_preempted():
    driven = Driven(kv_tokens=100, admit_full_output=True)
    turns = [driven.turn(f"s{n}", "p" * 20, tokens=40) for n in range(4)]
    driven.settle()
    assert driven.engine.totals.preempted_count == 0
    assert all(turn.end is not None for turn in turns)


def test_the_idle_policy_says_what_becomes_of_kv_after_a_turn():
    for policy, tier in ((IdlePolicy.RETAIN, Tier.DEVICE), (IdlePolicy.SWAP, Tier.HOST), (IdlePolicy.DROP, Tier.NONE)):
        driven = Driven(idle_policy=policy)
        driven.complete("a", "hello")
        driven.settle()
        assert holding(driven, "a").longest()[0] is tier


def test_a_session_long_unused_is_forgotten():
    driven = Driven(forget_ns=60 * SECOND)
    driven.complete("a", "hello")
    driven.advance(61)
    driven.settle()
    assert not driven.engine._scheduler.sessions
    assert driven.runner.slots.get(0, []) == []


def test_a_copy_that_cannot_be_read_back_costs_a_recompute_and_nothing_else():
    driven = Driven()
    first = driven.complete("a", "hello")
    other = driven.complete("b", "other")
    driven.direct(swap_out(driven, "a"))
    driven.runner.fail_next_put = True
    again = driven.complete("a", "hello" + first.text)
    assert again.text == driven.runner.expected_output("hello" + first.text, 5)
    assert driven.engine.totals.swap_failures == 1
    assert again.end is not None
    assert again.end.cached_tokens == 0
    more = driven.complete("b", "other" + other.text)
    assert more.end is not None
    assert more.end.cached_tokens == 9


def test_a_full_host_tier_spills_idle_copies_to_disk(tmp_path):
    disk = DiskTier(tmp_path / "kv", "fake")
    driven = Driven(kv_tokens=1000, host_tokens=60, disk=disk, disk_tokens=1000)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a"))
    driven.complete("b", "y" * 50)
    driven.direct(swap_out(driven, "b", name="second"))
    driven.settle()
    assert holding(driven, "a").longest() == (Tier.DISK, 54)
    assert holding(driven, "b").longest() == (Tier.HOST, 54)
    again = driven.complete("a", "x" * 50 + first.text + "!")
    assert again.text == driven.runner.expected_output("x" * 50 + first.text + "!", 5)
    assert again.end is not None
    assert again.end.cached_tokens == 54
    disk.close()


def test_a_corrupt_swap_file_costs_a_recompute_and_nothing_else(tmp_path):
    disk = DiskTier(tmp_path / "kv", "fake")
    driven = Driven(disk=disk, disk_tokens=1000)
    first = driven.complete("a", "x" * 50)
    driven.direct(swap_out(driven, "a", Tier.DISK))
    driven.settle()
    disk.flush()
    (path,) = (tmp_path / "kv").glob("*/*.kv")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    again = driven.complete("a", "x" * 50 + first.text)
    assert again.text == driven.runner.expected_output("x" * 50 + first.text, 5)
    assert driven.engine.totals.swap_failures == 1
    disk.close()


# Directives


def test_a_directive_is_applied_once_per_id_and_answered_the_same_again():
    driven = Driven()
    driven.complete("a", "hello")
    driven.direct(swap_out(driven, "a"))
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    assert len([m for m in moved(driven) if m.to_tier is Tier.HOST]) == 1
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
    assert holding(driven, "a").longest()[0] is Tier.HOST


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
    assert holding(driven, "other").longest()[0] is Tier.HOST
    driven.advance(60)
    driven.complete("fourth", "w" * 45)
    assert holding(driven, "kept").longest()[0] is Tier.HOST


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
    assert driven.engine._ledger.host_used_bytes == 0
    assert driven.engine._swapper.host_tokens(S("a")) == 0


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


# Fairness


def test_tenants_share_service_by_weight_while_both_are_backlogged():
    driven = Driven(kv_tokens=1000, max_running=1)
    driven.engine.direct(
        ask.SetTenantWeight(
            directive_id="w", deadline_ns=driven.now_ns + SECOND, tenant_id=TenantId("heavy"), weight=3.0
        )
    )
    turns = [
        (tenant, driven.turn(f"{tenant}{n}", "p" * 10, 10, tenant)) for n in range(40) for tenant in ("heavy", "light")
    ]
    driven.steps(220)
    done = {"heavy": 0, "light": 0}
    for tenant, turn in turns:
        done[tenant] += turn.end is not None
    assert done["light"] >= 3
    assert done["heavy"] / done["light"] == pytest.approx(3.0, rel=0.35)


def test_a_tenant_that_was_idle_cannot_claim_what_it_did_not_use():
    driven = Driven(kv_tokens=1000, max_running=1)
    for number in range(10):
        driven.complete(f"busy{number}", "p" * 10, tokens=10, tenant="busy", ephemeral=True)
    late = [driven.turn(f"late{n}", "p" * 10, 10, "late", ephemeral=True) for n in range(10)]
    busy = [driven.turn(f"again{n}", "p" * 10, 10, "busy", ephemeral=True) for n in range(10)]
    driven.steps(1)
    driven.steps(120)
    finished = (sum(t.end is not None for t in late), sum(t.end is not None for t in busy))
    assert min(finished) >= 3, finished


def test_turns_are_reported_when_they_enter_the_batch_with_what_was_cached():
    driven = Driven()
    first = driven.complete("a", "hello")
    driven.complete("a", "hello" + first.text + "x")
    started = [r.report for r in driven.reports if isinstance(r.report, TurnStarted)]
    assert [s.cached_tokens for s in started] == [0, 9]


def test_a_tenant_below_its_share_of_the_places_takes_one_from_a_flood():
    driven = Driven(kv_tokens=1000, max_running=4)
    flood = [driven.turn(f"flood{n}", "p" * 10, 200, "flood") for n in range(8)]
    driven.steps(5)
    modest = driven.turn("modest", "q" * 10, 5, "modest")
    driven.steps(8)
    assert modest.end is not None, "it waited for a turn of the flood to end"
    assert driven.engine.totals.swap_out_count == 0, "the paused turn's KV stays where it is"
    driven.settle(5000)
    for turn in flood:
        assert turn.text == driven.runner.expected_output("p" * 10, 200)


def test_equal_tenants_do_not_trade_a_place_back_and_forth():
    driven = Driven(kv_tokens=1000, max_running=3)
    for n in range(4):
        driven.turn(f"a{n}", "p" * 10, 60, "a")
        driven.turn(f"b{n}", "q" * 10, 60, "b")
    driven.steps(3)
    running = set(driven.engine._scheduler.running)
    driven.steps(20)
    assert set(driven.engine._scheduler.running) == running


# Shared prefixes


def test_a_session_takes_over_the_prefix_another_one_has_and_it_is_charged_once():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha")
    used = driven.engine._ledger.device_used_tokens
    turn = driven.complete("b", "s" * 50 + "beta")
    assert turn.text == driven.runner.expected_output("s" * 50 + "beta", 5)
    assert turn.end is not None
    assert turn.end.cached_tokens == 50
    assert driven.engine._ledger.device_used_tokens == used + len("beta") + 4
    assert driven.engine._ledger.shared_tokens(S("a")) == 50


def test_when_one_of_two_leaves_the_other_is_charged_for_the_whole_prefix():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha")
    second = driven.complete("b", "s" * 50 + "beta")
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    assert driven.engine._ledger.device_used_tokens == 50 + len("beta") + 4
    assert driven.engine._ledger.shared_tokens(S("b")) == 0
    again = driven.complete("b", "s" * 50 + "beta" + second.text)
    assert again.end is not None
    assert again.end.cached_tokens == 58


def test_a_short_common_beginning_is_not_worth_sharing():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "hello alpha")
    turn = driven.complete("b", "hello beta")
    assert turn.end is not None
    assert turn.end.cached_tokens == 0


def test_a_prefix_is_not_shared_across_tenants():
    driven = Driven(share_prefix_tokens=10)
    driven.complete("a", "s" * 50 + "alpha", tenant="blue")
    turn = driven.complete("b", "s" * 50 + "beta", tenant="red")
    assert turn.end is not None
    assert turn.end.cached_tokens == 0


def test_past_its_limit_of_sessions_the_engine_forgets_the_one_unused_longest():
    driven = Driven(max_sessions=2)
    for name in ("a", "b", "c"):
        driven.complete(name, f"hello {name}")
        driven.advance(1)
    assert set(driven.engine._scheduler.sessions) == {S("b"), S("c")}


def test_a_prefix_whose_donor_was_lost_in_the_same_step_is_computed_instead():
    driven = Driven(share_prefix_tokens=10)
    first = driven.complete("a", "s" * 50 + "alpha")
    driven.direct(swap_out(driven, "a"))
    driven.settle()
    driven.runner.fail_next_put = True
    back = driven.turn("a", "s" * 50 + "alpha" + first.text, 5)
    sharer = driven.turn("b", "s" * 50 + "beta", 5)
    for _ in range(200):
        driven.engine.cycle()
        driven.engine._ledger.check_integrity()
    assert back.text == driven.runner.expected_output("s" * 50 + "alpha" + first.text, 5)
    assert sharer.text == driven.runner.expected_output("s" * 50 + "beta", 5)
    assert driven.engine.totals.swap_failures == 2, "the donor's copy, and the prefix it could not give"
