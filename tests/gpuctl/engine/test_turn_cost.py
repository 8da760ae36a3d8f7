"""What turns are said to cost: PTE, waste, energy and slowdown, on a runner that counts and on the real one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.energy import EnergyMeter
from equipoise.gpuctl.engine.metrics import page
from equipoise.gpuctl.engine.openai import wire
from equipoise.gpuctl.engine.schedule.cost_figures import CostFigures
from equipoise.gpuctl.engine.schedule.sequence import SessionId, TenantId, TurnFinished, TurnRequest
from equipoise.gpuctl.engine.turn_cost import READING_PERIOD_NS
from equipoise.gpuctl.reports import TurnEnded
from equipoise.policies.accounting import Gamma, GammaSource, SessionCost
from equipoise.tests.gpuctl.engine.asking import Asked
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven, Turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GAMMA = 0.01
COST = CostFigures(prefill_seconds_per_token=0.1, decode_step_seconds=1.0, decode_seconds_per_context_token=GAMMA * 0.1)


class Counter:
    """An energy counter the test turns."""

    name = "cpu"

    def __init__(self) -> None:
        self.value: float | None = 1000.0
        self.read_count = 0

    def joules(self) -> float | None:
        self.read_count += 1
        return self.value

    def use(self, joules: float) -> None:
        assert self.value is not None
        self.value += joules

    def close(self) -> None:
        pass


def driven(counter: Counter | None = None, **options: Any) -> Driven:
    meter = None if counter is None else EnergyMeter((counter,))
    made = Driven(meter=meter, **options)
    made.engine.cost = COST
    return made


def end_of(turn: Turn) -> TurnFinished:
    assert turn.end is not None
    return turn.end


def drop(made: Driven, session: str, name: str = "drop") -> None:
    made.direct(
        ask.Drop(directive_id=name, deadline_ns=made.now_ns + SECOND, session_id=SessionId(session), from_token=0)
    )


# PTE


def test_a_turn_costs_its_prompt_and_gamma_times_the_context_of_each_step_after_it():
    end = end_of(driven().complete("a", "p" * 10, tokens=4))
    # 10 prompt tokens; the first output comes with them; three steps read 11, 12 and 13 tokens.
    assert end.cost.pte == pytest.approx(10 + GAMMA * (11 + 12 + 13))
    assert end.cost.wasted_pte == 0


def test_a_resumed_turn_costs_less_with_its_kv_in_place_than_after_a_drop_and_the_difference_is_the_waste():
    kept, dropped = driven(), driven()
    ends = []
    for made in (kept, dropped):
        first = made.complete("a", "p" * 10, tokens=4)
        if made is dropped:
            drop(made, "a")
        ends.append(end_of(made.complete("a", "p" * 10 + first.text + "more", tokens=3)))
    # Without a drop 13 tokens are held; the last output and "more" are new: 5 prompt tokens.
    assert ends[0].cost.pte == pytest.approx(5 + GAMMA * (19 + 20))
    assert ends[0].cost.wasted_pte == 0
    assert ends[1].cost.pte == pytest.approx(18 + GAMMA * (19 + 20))
    assert ends[1].cost.wasted_pte == 13


def test_outputs_computed_again_after_a_preemption_are_waste_and_not_decode():
    made = driven()
    turn = made.turn("a", "p" * 10, tokens=6)
    made.steps(4)  # the prompt and three decode steps: 13 tokens computed
    made.direct(
        ask.Preempt(
            directive_id="p",
            deadline_ns=made.now_ns + SECOND,
            session_id=SessionId("a"),
            mode=ask.PreemptMode.RECOMPUTE,
        )
    )
    made.settle()
    end = end_of(turn)
    wasted = end.recomputed_tokens
    assert wasted >= 12
    alone = end_of(driven().complete("a", "p" * 10, tokens=6))
    assert end.cost.wasted_pte == wasted
    assert alone.cost.pte is not None
    assert end.cost.pte is not None
    # What it would have cost anyway, and the waste.
    assert end.cost.pte == pytest.approx(alone.cost.pte + wasted)


def test_the_same_prompt_again_wastes_nothing_though_its_last_token_is_computed_for_its_logits():
    made = driven()
    made.complete("a", "p" * 10, tokens=4)
    end = end_of(made.complete("a", "p" * 10, tokens=4))
    assert end.cached_tokens == 9
    assert end.cost.wasted_pte == 0
    assert end.cost.pte == pytest.approx(1 + GAMMA * (11 + 12 + 13))


def test_without_a_measured_gamma_no_pte_is_told_but_the_waste_is():
    made = Driven()
    first = made.complete("a", "p" * 10, tokens=4)
    drop(made, "a")
    end = end_of(made.complete("a", "p" * 10 + first.text + "more", tokens=3))
    assert end.cost.pte is None
    assert end.session_cost.pte is None
    assert end.cost.wasted_pte == 13


def test_a_gamma_given_goes_before_the_measured_one():
    made = Driven(gamma=Gamma(0.5, GammaSource.TABLE))
    made.engine.cost = COST
    assert end_of(made.complete("a", "p" * 10, tokens=2)).cost.pte == pytest.approx(10 + 0.5 * 11)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(1, 8), st.booleans()), min_size=1, max_size=8
    )
)
def test_a_session_costs_the_sum_of_its_turns_and_waste_is_part_of_the_work(turns):
    made = driven(kv_tokens=120, host_tokens=0)
    asked: dict[str, list[TurnFinished]] = {}
    texts: dict[str, str] = {}
    for number, (session, length, tokens, dropped) in enumerate(turns):
        text = (texts.get(session, "") + "p" * length)[:100]
        turn = made.turn(session, text, tokens)
        made.settle()
        texts[session] = text + turn.text
        asked.setdefault(session, []).append(end_of(turn))
        if dropped:
            drop(made, session, f"d{number}")
    for ends in asked.values():
        for end in ends:
            assert end.cost.pte is not None
            assert 0 <= end.cost.wasted_pte <= end.cost.pte
            assert end.cost.wasted_pte == end.recomputed_tokens
        assert ends[-1].session_cost.pte == pytest.approx(sum(end.cost.pte or 0 for end in ends))
        assert ends[-1].session_cost.turn_count == len(ends)
    totals = made.engine._accounts.now().tenants[TenantId("t")]
    assert totals.pte == pytest.approx(sum(end.cost.pte or 0 for ends in asked.values() for end in ends))
    assert totals.wasted_pte == made.engine.totals.recomputed_tokens


# Energy


def test_energy_goes_to_the_turns_of_a_step_by_what_each_would_take_alone():
    counter = Counter()
    made = driven(counter)
    small = made.turn("a", "p" * 10, tokens=1)
    large = made.turn("b", "p" * 30, tokens=1)
    step = made.runner.step

    def burning(slices: Any) -> Any:
        counter.use(8.0)
        return step(slices)

    made.runner.step = burning  # type: ignore[method-assign]
    made.settle()
    assert made.engine.totals.steps == 1
    assert end_of(small).cost.energy_joules == pytest.approx(2.0)
    assert end_of(large).cost.energy_joules == pytest.approx(6.0)


def test_what_is_used_between_turns_is_nobodys():
    counter = Counter()
    made = driven(counter)
    first = made.complete("a", "hello", tokens=3)
    counter.use(500.0)
    second = made.complete("b", "hello", tokens=3)
    assert end_of(first).cost.energy_joules == 0.0
    assert end_of(second).cost.energy_joules == 0.0


def test_what_is_used_while_a_turn_is_held_is_nobodys():
    counter = Counter()
    made = driven(counter)
    turn = made.turn("a", "hello", tokens=3)
    made.steps(1)
    hold = ask.Hold(directive_id="h", deadline_ns=made.now_ns + SECOND, session_id=SessionId("a"), ttl_ns=5 * SECOND)
    made.direct(hold)
    made.steps(2)
    counter.use(500.0)
    made.advance(6)
    made.settle()
    assert end_of(turn).cost.energy_joules == 0.0


def test_without_a_counter_energy_is_none_for_turn_session_and_tenant():
    made = driven()
    end = end_of(made.complete("a", "hello", tokens=3))
    assert end.cost.energy_joules is None
    assert end.session_cost.energy_joules is None
    assert made.engine._accounts.now().tenants[TenantId("t")].energy_joules is None


def test_a_counter_that_fails_half_way_leaves_that_turn_unmeasured_and_serving_unharmed():
    counter = Counter()
    made = driven(counter)
    whole = made.complete("a", "hello", tokens=3)
    broken = made.turn("a", "hello again", tokens=5)
    made.steps(2)
    counter.value = None
    made.settle()
    counter.value = 2000.0
    again = made.complete("a", "hello once more", tokens=3)
    expected = Driven().complete("x", "hello again", tokens=5).text
    assert broken.text == expected
    assert end_of(whole).cost.energy_joules == 0.0
    assert end_of(broken).cost.energy_joules is None
    assert end_of(again).cost.energy_joules == 0.0
    assert end_of(again).session_cost.energy_joules is None, "a part would pass for the whole"
    assert made.engine._accounts.now().tenants[TenantId("t")].energy_joules == 0.0


def test_a_counter_that_starts_again_below_leaves_the_turn_unmeasured():
    counter = Counter()
    made = driven(counter)
    turn = made.turn("a", "hello", tokens=5)
    made.steps(2)
    counter.value = 3.0
    made.settle()
    assert end_of(turn).cost.energy_joules is None


def test_counters_are_read_once_a_period_however_short_the_steps():
    counter = Counter()
    made = driven(counter)
    made.turn("a", "hello", tokens=50)
    for _ in range(50):
        made.steps(1)
        made.advance(0.01)
    periods = 50 * 10_000_000 / READING_PERIOD_NS
    assert counter.read_count <= periods + 4


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=8),
    st.lists(st.floats(0, 20), min_size=1, max_size=10),
    st.floats(0, 0.3),
)
def test_all_energy_used_in_steps_is_given_out_and_none_twice(turns, burns, step_s):
    counter = Counter()
    made = driven(counter)
    step, burnt = made.runner.step, itertools.cycle(burns)
    used = 0.0

    def burning(slices: Any) -> Any:
        nonlocal used
        joules = next(burnt)
        used += joules
        counter.use(joules)
        made.advance(step_s)
        return step(slices)

    made.runner.step = burning  # type: ignore[method-assign]
    asked = [made.turn(session, "p" * length, tokens) for session, length, tokens in turns]
    made.settle()
    given_out = [end_of(turn).cost.energy_joules for turn in asked]
    assert all(joules is not None and joules >= 0 for joules in given_out)
    assert sum(joules or 0 for joules in given_out) == pytest.approx(used, abs=1e-6)


# Slowdown


def test_the_slowdown_of_a_session_is_time_over_ideal_over_all_its_turns():
    made = driven(max_running=1)
    first = made.turn("a", "p" * 10, 3)
    second = made.turn("a", "p" * 10, 3)
    for _ in range(20):
        made.steps(1)
        made.advance(1)
    # Alone: 10 x 0.1 s + 2 x 1 s, and 1 x 0.1 s + 2 x 1 s, since the second finds all but its last token.
    assert end_of(first).cost.ideal_ns == pytest.approx(3.0 * SECOND)
    assert end_of(second).cost.ideal_ns == pytest.approx(2.1 * SECOND)
    durations = [end_of(turn).cost.duration_ns for turn in (first, second)]
    assert durations[1] > durations[0], "it waited for the first"
    assert end_of(second).session_cost.slowdown_ratio == pytest.approx(sum(durations) / (5.1 * SECOND))


# Told


def answer(*, chat: bool) -> wire.Answer:
    turn = TurnRequest(SessionId("a"), TenantId("t"), "p")
    return wire.Answer(
        "fake", wire.Ask(turn, stream=True, stream_usage=False, chat=chat, one_call=False), SessionId("a"), "t1"
    )


def test_the_report_to_the_daemon_and_the_answer_to_the_client_say_the_same():
    made = driven(Counter())
    end = end_of(made.complete("a", "p" * 10, tokens=4))
    [ended] = [r.report for r in made.reports if isinstance(r.report, TurnEnded)]
    assert ended.cost == end.cost
    own = answer(chat=True).closing(end)["equipoise"]
    assert own["pte"] == pytest.approx(10.36)
    assert (own["pte_wasted"], own["energy_joules"]) == (0, 0.0)
    assert own["session_cost"]["turns"] == 1
    assert own["session_cost"]["pte"] == own["pte"]


def test_what_is_not_measured_is_null_in_the_answer_and_never_zero():
    end = end_of(Driven().complete("a", "hello", tokens=3))
    own = answer(chat=False).closing(end)["equipoise"]
    for cost in (own, own["session_cost"]):
        assert (cost["pte"], cost["energy_joules"], cost["slowdown_ratio"]) == (None, None, None)


def metrics_of(made: Driven) -> str:
    engine = made.engine
    return page(engine._reporter.occupancy(), engine._scheduler.service.counters(), engine._accounts.now()).decode()


def test_the_metrics_page_adds_up_by_tenant():
    counter = Counter()
    made = driven(counter)
    for tenant in ("blue", "red", "blue"):
        turn = made.turn(f"{tenant}-s", "p" * 10, 4, tenant=tenant)
        made.steps(1)
        counter.use(2.0)
        made.settle()
        assert turn.end is not None
    text = metrics_of(made)
    assert 'equipoise_engine_prefill_token_equivalents_total{tenant="red"} 10.36' in text
    assert 'equipoise_engine_wasted_prefill_token_equivalents_total{tenant="blue"} 0.0' in text
    assert 'equipoise_engine_energy_joules_total{tenant="blue"} 4.0' in text
    assert 'equipoise_engine_energy_joules_total{tenant="red"} 2.0' in text
    assert 'equipoise_engine_accounting_info{energy="cpu",gamma="measured"} 1.0' in text
    assert "equipoise_engine_gamma_ratio 0.01" in text


def test_the_metrics_page_of_what_is_not_measured_says_so_and_has_no_zero():
    made = Driven()
    made.complete("a", "hello", tokens=3)
    text = metrics_of(made)
    assert 'equipoise_engine_accounting_info{energy="not measured",gamma="not measured"} 1.0' in text
    for name in ("energy_joules_total", "prefill_token_equivalents_total", "gamma_ratio"):
        assert f"\nequipoise_engine_{name}{{" not in text and f"\nequipoise_engine_{name} " not in text


@pytest.mark.engine
def test_a_real_turn_resumed_with_its_kv_costs_less_than_the_same_turn_after_a_drop(make_engine):
    engine, _ = make_engine()
    engine.cost = COST
    opening = "The river rose in the night. " * 8
    ends: dict[str, TurnFinished] = {}
    for session in ("kept", "dropped"):
        first = Asked(engine, session, opening, 6)
        first.finish()
        if session == "dropped":
            engine.direct(
                ask.Drop(
                    directive_id="d",
                    deadline_ns=engine._clock() + 60 * SECOND,
                    session_id=SessionId(session),
                    from_token=0,
                )
            )
        second = Asked(engine, session, opening + first.text + " By morning", 6, ignore_end_of_text=True)
        ends[session] = second.finish()
    kept, dropped = ends["kept"].cost, ends["dropped"].cost
    assert kept.pte is not None and dropped.pte is not None
    assert dropped.pte - kept.pte == pytest.approx(dropped.wasted_pte)
    assert dropped.wasted_pte > 40
    assert kept.wasted_pte == 0
    assert kept.pte < dropped.pte / 3
    assert ends["kept"].session_cost != SessionCost()
