"""Prefill-token equivalents, worked by hand; what must hold of them for any work."""

from __future__ import annotations

import pytest
from equipoise.policies.accounting import (
    Gamma,
    GammaSource,
    ModelShape,
    SessionCost,
    TurnCost,
    Work,
    gamma_from_table,
    gamma_from_times,
    pte,
    work_of,
)
from hypothesis import given
from hypothesis import strategies as st

SMOLLM2 = ModelShape(30, 3, 64, 64, 2, 134_515_008)
LLAMA3_8B = ModelShape(32, 8, 128, 128, 2, 8_030_261_248)
GAMMA = Gamma(0.01, GammaSource.MEASURED)


def test_a_turn_worked_by_hand():
    # 100 prompt tokens, 60 of them cached; 4 outputs, of which the first comes with the prompt's last token, so three
    # decode steps: they read 101, 102 and 103 tokens. 40 + 0.01 x 306 = 43.06.
    work = work_of(60, 40, prompt_tokens=100, again_tokens=0)
    for position in (100, 101, 102):
        work += work_of(position, 1, prompt_tokens=100, again_tokens=0)
    assert work == Work(prefill_tokens=40, wasted_tokens=0, decode_tokens=3, decode_context_tokens=306)
    assert pte(work, GAMMA) == pytest.approx(43.06)


def test_dropped_tokens_computed_again_are_prefill_and_waste():
    # The KV of 103 tokens (100 of prompt, 3 of output) was dropped; they are computed again, with one more.
    work = work_of(0, 103, prompt_tokens=100, again_tokens=103) + work_of(103, 1, prompt_tokens=100, again_tokens=0)
    assert work == Work(prefill_tokens=103, wasted_tokens=103, decode_tokens=1, decode_context_tokens=104)
    assert pte(work, GAMMA) == pytest.approx(104.04)


def test_kv_bytes_follow_from_the_shape():
    assert SMOLLM2.kv_bytes_per_token == 30 * 3 * 128 * 2 == 23_040
    assert LLAMA3_8B.kv_bytes_per_token == 131_072


def test_gamma_of_a_known_gpu_is_kv_bytes_times_its_intensity_over_two_flop_a_parameter():
    found = gamma_from_table(LLAMA3_8B, ["NVIDIA H100 80GB HBM3"])
    assert found is not None
    assert found.source is GammaSource.TABLE
    assert found.prefill_tokens == pytest.approx(131_072 * 756.5 / (2 * 8_030_261_248)) == pytest.approx(0.006174, 1e-3)
    h200, a100 = (gamma_from_table(LLAMA3_8B, [name]) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
    assert h200 is not None and a100 is not None
    assert found.prefill_tokens / h200.prefill_tokens == pytest.approx(756.5 / 348.1)
    assert found.prefill_tokens / a100.prefill_tokens == pytest.approx(756.5 / 322.5)


@pytest.mark.parametrize(
    "names", [[], ["NVIDIA GeForce RTX 4090"], ["NVIDIA H100 PCIe", "NVIDIA A100 80GB PCIe"], ["NVIDIA H100", "other"]]
)
def test_a_gpu_outside_the_table_or_a_mixed_set_has_no_table_gamma(names):
    assert gamma_from_table(LLAMA3_8B, names) is None


def test_two_gpus_of_one_kind_are_as_one():
    assert gamma_from_table(LLAMA3_8B, ["NVIDIA H200", "NVIDIA H200"]) == gamma_from_table(LLAMA3_8B, ["NVIDIA H200"])


def test_gamma_from_times_is_their_ratio_and_none_where_one_was_not_measured():
    assert gamma_from_times(2e-5, 4e-3) == Gamma(0.005, GammaSource.MEASURED)
    assert gamma_from_times(0.0, 4e-3) is None
    assert gamma_from_times(2e-5, 0.0) is None


def test_slowdown_is_time_over_ideal_and_that_of_a_session_weighs_by_time():
    short, long = TurnCost(duration_ns=40, ideal_ns=10), TurnCost(duration_ns=100, ideal_ns=100)
    assert short.slowdown_ratio == 4
    assert SessionCost().plus(short).plus(long).slowdown_ratio == pytest.approx(140 / 110)
    untimed = TurnCost(duration_ns=1000, ideal_ns=None)
    assert untimed.slowdown_ratio is None
    assert SessionCost().plus(untimed).slowdown_ratio is None
    assert SessionCost().plus(untimed).plus(short).slowdown_ratio == 4


def test_a_figure_that_one_turn_lacks_the_session_lacks_and_never_shows_as_zero():
    assert SessionCost().energy_joules is None
    assert SessionCost().pte is None
    measured = SessionCost().plus(TurnCost(pte=1.5, energy_joules=2.0)).plus(TurnCost(pte=2.0, energy_joules=3.0))
    assert (measured.pte, measured.energy_joules) == (3.5, 5.0)
    broken = measured.plus(TurnCost(pte=1.0)).plus(TurnCost(pte=1.0, energy_joules=4.0))
    assert (broken.pte, broken.energy_joules) == (5.5, None)


slices = st.builds(
    lambda start, count, again, prompt: work_of(start, count, prompt_tokens=prompt, again_tokens=min(again, count)),
    st.integers(0, 5000),
    st.integers(1, 500),
    st.integers(0, 500),
    st.integers(1, 5000),
)
gammas = st.builds(Gamma, st.floats(1e-6, 1.0), st.just(GammaSource.MEASURED))


@given(st.lists(slices, min_size=1, max_size=8), gammas)
def test_waste_is_part_of_what_was_computed_and_pte_adds_up(pieces, gamma):
    whole = sum(pieces, Work())
    assert 0 <= whole.wasted_tokens <= whole.prefill_tokens
    assert pte(whole, gamma) >= whole.prefill_tokens
    assert pte(whole, gamma) == pytest.approx(sum(pte(piece, gamma) for piece in pieces))


@given(st.integers(0, 3000), st.integers(1, 300), st.integers(1, 300), st.integers(0, 3000), gammas)
def test_a_slice_cut_in_two_costs_what_it_costs_whole(start, first, second, prompt, gamma):
    whole = work_of(start, first + second, prompt_tokens=prompt, again_tokens=0)
    halves = work_of(start, first, prompt_tokens=prompt, again_tokens=0) + work_of(
        start + first, second, prompt_tokens=prompt, again_tokens=0
    )
    assert halves == whole


@given(st.integers(1, 3000), st.integers(0, 60), st.data(), gammas)
def test_more_cache_hits_never_raise_pte(prompt, outputs, data, gamma):
    fewer = data.draw(st.integers(0, prompt - 1))
    more = data.draw(st.integers(fewer, prompt - 1))

    def cost(cached: int) -> float:
        work = work_of(cached, prompt + outputs - cached, prompt_tokens=prompt, again_tokens=0)
        return pte(work, gamma)

    assert cost(more) <= cost(fewer)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_the_pte_of_a_session_is_the_sum_of_its_turns(ptes):
    session = SessionCost()
    for value in ptes:
        session = session.plus(TurnCost(pte=value, wasted_pte=value / 2))
    assert session.turn_count == len(ptes)
    assert session.pte == pytest.approx(sum(ptes))
    assert session.wasted_pte == pytest.approx(sum(ptes) / 2)
