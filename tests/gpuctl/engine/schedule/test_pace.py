"""Wished times: when a turn is due, and how large a chunk of a prompt the others' pace allows."""

from __future__ import annotations

from typing import Any

import pytest
from equipoise.gpuctl.engine.schedule.cost_figures import CostFigures
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Slo, TenantId, Turn, TurnId
from equipoise.gpuctl.engine.schedule.slo import begin_by_ns, due_ns, prefill_seconds_allowed
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven
from hypothesis import given
from hypothesis import strategies as st

MS = 10**6
# 1 ms a prompt token, 10 ms a decode step, 2 ms more for each further sequence.
COST = CostFigures(prefill_seconds_per_token=0.001, decode_step_seconds=0.010, decode_seconds_per_sequence=0.002)


def turn_of(slo: Slo, *, output: int = 0, first_token_ns: int | None = None, prompt: int = 100) -> Turn:
    turn = Turn(TurnId("1"), SessionId("a"), TenantId("t"), 0, prompt, 50, slo=slo)
    turn.output_tokens, turn.first_token_ns = output, first_token_ns
    return turn


# When a turn is due


def test_before_its_first_token_a_turn_is_due_by_the_tighter_of_its_first_token_and_its_deadline():
    assert begin_by_ns(turn_of(Slo(ttft_ns=500 * MS)), COST, 0) == 400 * MS
    assert begin_by_ns(turn_of(Slo(ttft_ns=500 * MS)), COST, 60) == 460 * MS
    assert begin_by_ns(turn_of(Slo(ttft_ns=5 * SECOND, deadline_ns=SECOND)), COST, 0) == (1000 - 100 - 500) * MS
    assert begin_by_ns(turn_of(Slo(tpot_ns=20 * MS)), COST, 0) is None


def test_from_its_first_token_on_a_turn_is_due_by_its_pace_and_what_is_left_until_its_deadline():
    started = {"output": 3, "first_token_ns": 200 * MS}
    assert due_ns(turn_of(Slo(ttft_ns=MS), **started), COST) is None
    assert due_ns(turn_of(Slo(tpot_ns=20 * MS), **started), COST) == (200 + 3 * 20 - 10) * MS
    assert due_ns(turn_of(Slo(deadline_ns=SECOND), **started), COST) == (1000 - 47 * 10) * MS
    assert due_ns(turn_of(Slo(deadline_ns=SECOND, tpot_ns=SECOND), **started), COST) == (1000 - 47 * 10) * MS


def test_a_waiting_turn_with_less_margin_goes_first_within_its_tenant():
    driven = Driven(max_running=1)
    driven.engine.cost = COST
    for name, slo in (("none", Slo()), ("late", Slo(deadline_ns=90 * SECOND)), ("soon", Slo(ttft_ns=2 * SECOND))):
        driven.turn(name, f"hello {name}", 3, slo=slo)
        driven.advance(0.01)
    order = []
    for _ in range(12):
        driven.steps(1)
        order += [name for name in driven.engine._scheduler.running if name not in order]
    assert order == ["soon", "late", "none"]


# How much of a step prompts may take


def test_a_step_has_the_time_until_the_next_token_of_the_turn_that_has_least():
    quick = turn_of(Slo(tpot_ns=50 * MS), output=2, first_token_ns=0)
    slow = turn_of(Slo(tpot_ns=200 * MS), output=2, first_token_ns=0)
    plain = turn_of(Slo(), output=2, first_token_ns=0)
    # Three sequences decode in 14 ms; the quick one's third token is due at 100 ms.
    assert prefill_seconds_allowed([quick, slow, plain], COST, 40 * MS) == pytest.approx(0.100 - 0.040 - 0.014)
    assert prefill_seconds_allowed([slow, plain], COST, 40 * MS) == pytest.approx(0.400 - 0.040 - 0.012)
    assert prefill_seconds_allowed([plain], COST, 40 * MS) is None
    assert prefill_seconds_allowed([], COST, 40 * MS) is None


def test_a_turn_behind_its_pace_allows_prompts_nothing():
    behind = turn_of(Slo(tpot_ns=50 * MS), output=2, first_token_ns=0)
    allowed = prefill_seconds_allowed([behind], COST, 500 * MS)
    assert allowed is not None
    assert allowed < 0
    assert COST.prefill_tokens_within(allowed) == 0


def test_a_pace_no_step_can_keep_slows_no_prompt():
    assert prefill_seconds_allowed([turn_of(Slo(tpot_ns=9 * MS), output=1, first_token_ns=0)], COST, 0) is None


@given(
    seconds=st.floats(1e-6, 100), held=st.integers(0, 10_000), per_token=st.floats(0, 0.1), per_pair=st.floats(0, 1e-4)
)
def test_as_many_prompt_tokens_fit_a_time_as_their_cost_says(seconds, held, per_token, per_pair):
    cost = CostFigures(prefill_seconds_per_token=per_token, prefill_seconds_per_token2=per_pair)
    if per_token + per_pair < 1e-7:
        return
    count = cost.prefill_tokens_within(seconds, held)
    assert cost.prefill_seconds(held + count, held) <= seconds * (1 + 1e-6)
    assert cost.prefill_seconds(held + count + 1, held) >= seconds * (1 - 1e-6)


# In the engine: time passes as the cost model says


class Paced(Driven):
    """Its clock moves by what each step costs."""

    def __init__(self, cost: CostFigures = COST, **options: Any) -> None:
        super().__init__(**options)
        self.engine.cost = cost
        self.prompt_chunks: list[int] = []
        step = self.runner.step

        def timed(slices):
            prompt = [len(item.tokens) for item in slices if len(item.tokens) > 1 or item.sampler is None]
            decoding = len(slices) - len(prompt)
            self.now_ns += int((cost.prefill_seconds(sum(prompt)) + cost.decode_seconds(decoding)) * 1e9)
            if decoding:
                self.prompt_chunks.append(sum(prompt))
            return step(slices)

        self.runner.step = timed  # type: ignore[method-assign]


def seconds_per_token(driven: Paced, turn, tokens: int) -> float:
    """Time from the turn's first text to its last over the tokens between them."""
    while not turn.text:
        driven.steps(1)
    began = driven.now_ns
    while turn.end is None:
        driven.steps(1)
    return (driven.now_ns - began) / 1e9 / (tokens - 1)


def test_a_running_turn_keeps_its_wished_pace_beside_a_long_prompt():
    for slo, chunk in ((Slo(tpot_ns=45 * MS), 35), (Slo(), 64)):
        driven = Paced(kv_tokens=2000)
        turn = driven.turn("paced", "hello", 20, slo=slo)
        driven.steps(1)
        driven.turn("long", "x" * 1500, 1)
        pace = seconds_per_token(driven, turn, 20)
        assert max(driven.prompt_chunks) <= 64
        # 10 ms for its own token, the rest of its wish, or all that a mixed step takes, for the prompt.
        assert pace == pytest.approx(0.010 + chunk * 0.001, abs=0.002), slo
        driven.settle()


def test_time_saved_in_steps_without_prompts_may_be_spent_on_a_larger_chunk_later():
    driven = Paced()
    turn = driven.turn("paced", "hello", 20, slo=Slo(tpot_ns=45 * MS))
    driven.steps(6)  # five tokens of 10 ms each: 140 ms ahead
    driven.turn("long", "x" * 200, 1)
    driven.steps(2)
    assert driven.prompt_chunks[-2:] == [64, 64]
    driven.settle()
    assert turn.end is not None


def test_a_prompt_goes_on_whatever_pace_is_wished():
    driven = Paced(paced_prefill_tokens=5)
    turn = driven.turn("paced", "hello", 40, slo=Slo(tpot_ns=11 * MS))  # one token's time leaves 1 ms
    driven.steps(1)
    long = driven.turn("long", "x" * 100, 1)
    driven.steps(1)
    driven.steps(20)
    assert long.end is not None
    assert turn.end is None
    assert set(driven.prompt_chunks[1:20]) == {5}


def test_a_prompt_whose_first_token_is_awaited_is_cut_less():
    driven = Paced(paced_prefill_tokens=5, mixed_prefill_tokens=40)
    driven.turn("paced", "hello", 100, slo=Slo(tpot_ns=11 * MS))
    driven.steps(1)
    urgent = driven.turn("urgent", "x" * 200, 1, slo=Slo(ttft_ns=SECOND))
    driven.steps(1)
    while urgent.end is None:
        driven.steps(1)
    assert set(driven.prompt_chunks[:5]) == {40}


def test_without_measured_costs_a_wished_pace_changes_nothing():
    driven = Driven()
    driven.turn("paced", "hello", 20, slo=Slo(tpot_ns=MS))
    driven.steps(1)
    driven.turn("long", "x" * 200, 1)
    driven.steps(1)
    assert driven.engine._ledger.holding(SessionId("long")).device_tokens == 64
