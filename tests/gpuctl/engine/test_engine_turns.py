"""The engine above a runner that only counts: one turn after another, and what a session keeps between them."""

from __future__ import annotations

from equipoise.gpuctl.engine.schedule.sequence import FinishReason, SessionId
from equipoise.gpuctl.reports import TurnEnded, TurnStarted
from equipoise.tests.gpuctl.engine.driving import Driven

S = SessionId


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


def test_turns_are_reported_when_they_enter_the_batch_with_what_was_cached():
    driven = Driven()
    first = driven.complete("a", "hello")
    driven.complete("a", "hello" + first.text + "x")
    started = [r.report for r in driven.reports if isinstance(r.report, TurnStarted)]
    assert [s.cached_tokens for s in started] == [0, 9]


def test_past_its_limit_of_sessions_the_engine_forgets_the_one_unused_longest():
    driven = Driven(max_sessions=2)
    for name in ("a", "b", "c"):
        driven.complete(name, f"hello {name}")
        driven.advance(1)
    assert set(driven.engine._scheduler.sessions) == {S("b"), S("c")}
