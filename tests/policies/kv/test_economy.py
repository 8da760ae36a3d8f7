"""Prices, the cost of each choice, and when a choice changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.estimate import Estimates
from equipoise.policies.kv.economy import (
    PRICE_CAP,
    STEP_BORDER_S,
    Books,
    Prices,
    Weighed,
    barrier,
    choose,
    expected_wait_s,
    predicted_burst_bytes,
    prices,
    running_bytes,
    standing,
    weigh,
)
from equipoise.policies.model import MIB, CostModel, Engine, KvTier, Session, SessionPhase, ToolCallPhase, Verdict
from equipoise.policies.policy import KvPart
from equipoise.tests.policies.facts import call, engine, host, ns, policy, session, snapshot, stopped
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30


# -- prices


def test_an_empty_tier_is_free_and_a_full_one_costs_the_most() -> None:
    assert [barrier(u) for u in (0.0, -1.0, 1.0, 1.5)] == [0.0, 0.0, PRICE_CAP, PRICE_CAP]


def test_a_tier_three_quarters_full_has_price_one() -> None:
    assert barrier(0.75) == pytest.approx(1.0)
    assert barrier(0.5) == pytest.approx(1 / 27)
    assert barrier(0.9) == pytest.approx(27.0)


@given(st.floats(0, 2), st.floats(0, 2))
def test_a_price_never_falls_as_a_tier_fills(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= barrier(low) <= barrier(high) <= PRICE_CAP


def test_turns_that_wait_make_the_device_dearer() -> None:
    busy = engine(used_tokens=90, capacity_tokens=100)
    assert prices(snapshot(), policy(), busy).device == pytest.approx(27.0)
    assert prices(snapshot(), policy(), replace(busy, waiting_count=3)).device == pytest.approx(4 * 27.0)


def test_a_byte_that_nobody_asks_for_costs_nothing() -> None:
    half = engine(used_tokens=80, capacity_tokens=100)
    calls = (call(used_mib=820, phase=ToolCallPhase.KILLED),)
    calm = prices(snapshot(tool_calls=calls), policy(pool_mib=1024), half)
    assert (calm.device, calm.host) == (0.0, 0.0)
    asked = replace(half, waiting_count=1)
    stalled = snapshot(tool_calls=calls, host=host(psi_some_ratio=0.1))
    pressed = prices(stalled, policy(pool_mib=1024), asked)
    assert pressed.device > 0 and pressed.host > 0
    bare = policy(pool_mib=1024)
    without = replace(bare, kv=replace(bare.kv, without=frozenset({KvPart.NEED})))
    assert prices(snapshot(tool_calls=calls), without, half).device == pytest.approx(barrier(0.8))


def test_each_decision_leaves_the_next_one_other_books() -> None:
    on = engine(used_tokens=95_000, capacity_tokens=100_000, disk_capacity_bytes=GIB)
    books = Books.of(snapshot(engines=(on,)), policy(), on)
    held = session(held_tokens=10_000)
    size = 10_000 * on.bytes_per_token
    books.enter(Verdict.SWAP_HOST, held)
    assert (books.device_used_tokens, books.host_free_bytes) == (85_000, GIB - size)
    assert books.prices().device == 0.0, "the need has passed"
    books.enter(Verdict.SWAP_DISK, replace(held, tier=KvTier.HOST, host_bytes=size, disk_bytes=size // 2))
    assert (books.host_free_bytes, books.disk_free_bytes, books.ram_used_bytes) == (GIB, GIB - size // 2, 0)
    books.enter(Verdict.KEEP, held)
    assert books.device_used_tokens == 85_000


def test_what_a_lower_tier_holds_already_need_not_be_written_to_it() -> None:
    on = replace(FITTED, disk_capacity_bytes=GIB, cost=replace(FITTED.cost, disk_bytes_per_second=1e8))
    bare = session(held_tokens=1000)
    size = 1000 * on.bytes_per_token
    copied = replace(bare, disk_bytes=size)

    def cost(of: Session, copies: bool = True) -> float:
        made = weigh(of, on, 1.0, Prices(1.0, 1.0), 0, True, copies=copies)
        return next(o.cost for o in made if o.verdict is Verdict.SWAP_DISK)

    assert cost(bare) - cost(copied) == pytest.approx(size / 1e8 * size / GIB)
    assert cost(copied, copies=False) == cost(bare)


def test_host_memory_is_priced_by_tools_their_bursts_and_every_engines_tier() -> None:
    engines = (engine("e1", host_used_bytes=128 * MIB), engine("e2", host_used_bytes=128 * MIB))
    calls = (call(1, used_mib=128, expected_bytes=512 * MIB),)
    seen = snapshot(tool_calls=calls, engines=engines)
    assert prices(seen, policy(pool_mib=800), engines[0]).host == pytest.approx(barrier(768 / 800))


def test_pressure_stalls_make_host_memory_dearer() -> None:
    calls = (call(used_mib=960, phase=ToolCallPhase.KILLED),)
    calm = prices(snapshot(tool_calls=calls), policy(pool_mib=1024), engine())
    pressed = prices(snapshot(tool_calls=calls, host=host(psi_some_ratio=0.3)), policy(pool_mib=1024), engine())
    assert pressed.host == pytest.approx(4 * calm.host)


def test_a_pool_of_unknown_size_prices_host_memory_out() -> None:
    unknown = replace(policy(), memory=replace(policy().memory, tool_pool_bytes=None))
    assert prices(snapshot(host=host(0, 0)), unknown, engine()).host == PRICE_CAP


def test_a_call_can_grow_to_what_its_kind_reached_but_not_past_its_budget() -> None:
    learned = Estimates()
    for _ in range(100):
        learned = learned.observe("pytest", 1, 300 * MIB)  # in [256, 512) MiB: mean 384, 0.9 quantile 512
    for hard_mib, burst_mib in ((0, 512 - 10), (400, 400 - 10), (100, 100 - 10)):
        seen = snapshot(tool_calls=(call(used_mib=10, hard_mib=hard_mib),), estimates=learned)
        assert predicted_burst_bytes(seen) / MIB == pytest.approx(burst_mib, rel=0.01)
    declared = snapshot(tool_calls=(call(used_mib=10, hard_mib=100, expected_bytes=30 * MIB),), estimates=learned)
    assert predicted_burst_bytes(declared) == 20 * MIB


def test_of_many_calls_only_the_worst_is_expected_above_its_mean() -> None:
    learned = Estimates()
    for peak_mib in (10, 10, 10, 10, 300):
        learned = learned.observe("pytest", 1, peak_mib * MIB)
    one = predicted_burst_bytes(snapshot(tool_calls=(call(1, hard_mib=0),), estimates=learned))
    calls = tuple(call(i, hard_mib=0) for i in range(1, 4))
    three = predicted_burst_bytes(snapshot(tool_calls=calls, estimates=learned))
    assert one == 512 * MIB
    assert three - one == 2 * learned.peak_mean_bytes("pytest")


@pytest.mark.parametrize("over", [{"end_ns": 5, "phase": ToolCallPhase.ENDED}, {"phase": ToolCallPhase.KILLED}])
def test_a_call_that_is_over_bursts_no_more(over: dict[str, object]) -> None:
    assert predicted_burst_bytes(snapshot(tool_calls=(call(**over),))) == 0  # type: ignore[arg-type]


# -- how long the tool will take


def test_a_declared_duration_is_believed_until_it_has_passed() -> None:
    declared = call(expected_ns=ns(10))
    assert expected_wait_s(snapshot(4), declared) == pytest.approx(6.0)
    unknown = expected_wait_s(snapshot(12), call())
    assert expected_wait_s(snapshot(12), declared) == unknown


def test_a_throttled_call_takes_three_times_as_long() -> None:
    running = call(expected_ns=ns(10))
    throttled = replace(running, phase=ToolCallPhase.THROTTLED, phase_since_ns=ns(4))
    assert expected_wait_s(snapshot(4), throttled) == pytest.approx(3 * expected_wait_s(snapshot(4), running))


def test_a_stopped_call_waits_at_least_as_long_as_it_was_told_to() -> None:
    told = replace(stopped(since_s=4.0, expected_ns=ns(10)), waiting_until_ns=ns(24))
    assert expected_wait_s(snapshot(4), told) == pytest.approx(6 + 20)
    assert expected_wait_s(snapshot(4), replace(told, waiting_until_ns=None)) == pytest.approx(6 + 1)


def test_time_spent_stopped_is_not_progress() -> None:
    standing_since_4 = replace(stopped(since_s=4.0, expected_ns=ns(10)), waiting_until_ns=ns(24))
    assert expected_wait_s(snapshot(14), standing_since_4) == pytest.approx(6 + 10)


# -- what each choice costs


def options(
    held: int,
    on: Engine,
    wait_s: float,
    price: Prices,
    others: int = 0,
    host_room: bool = True,
    tier: KvTier = KvTier.DEVICE,
) -> dict[Verdict, float]:
    weighed = weigh(session(held_tokens=held, tier=tier), on, wait_s, price, others, host_room)
    assert [o.cost for o in weighed] == sorted(o.cost for o in weighed)
    return {o.verdict: o.cost for o in weighed}


FITTED = engine(
    cost=CostModel(
        prefill_seconds_per_token=1e-3,
        prefill_seconds_per_token2=1e-7,
        host_bytes_per_second=1e9,
        disk_bytes_per_second=1e8,
    )
)


@given(
    tokens=st.integers(1, 100_000),
    wait_s=st.floats(0.001, 1000),
    others=st.integers(0, 10 * GIB),
    rate=st.floats(1e-6, 1e-1),
    square=st.floats(0, 1e-6),
    bandwidth=st.floats(1e6, 1e11),
)
def test_with_host_memory_free_the_choice_is_the_least_of_infercepts_three_wastes(
    tokens: int, wait_s: float, others: int, rate: float, square: float, bandwidth: float
) -> None:
    on = engine(cost=CostModel(rate, square, host_bytes_per_second=bandwidth))
    context = tokens * on.bytes_per_token
    preserve = wait_s * context
    swap = 2 * (STEP_BORDER_S + context / bandwidth) * (context + others)  # the border is what our engine adds
    discard = (tokens * rate + tokens**2 * square) * (context + others)
    weighed = weigh(session(held_tokens=tokens), on, wait_s, Prices(device=1.0, host=0.0), others, True)
    assert {o.verdict: o.cost * GIB for o in weighed} == {
        Verdict.KEEP: pytest.approx(preserve),
        Verdict.SWAP_HOST: pytest.approx(swap),
        Verdict.DROP: pytest.approx(discard),
    }
    assert weighed[0].cost * GIB == pytest.approx(min(preserve, swap, discard))


def test_a_short_wait_keeps_and_a_long_one_swaps() -> None:
    price = Prices(device=1.0, host=0.001)
    short, long = options(1000, FITTED, 0.001, price), options(1000, FITTED, 100.0, price)
    assert min(short, key=lambda v: short[v]) is Verdict.KEEP
    assert min(long, key=lambda v: long[v]) is Verdict.SWAP_HOST


def test_dear_host_memory_pushes_kv_to_disk_and_without_a_disk_drops_it() -> None:
    with_disk = replace(FITTED, disk_capacity_bytes=GIB)
    price = Prices(device=1000.0, host=1000.0)
    choice = options(1000, with_disk, 100.0, price)
    assert min(choice, key=lambda v: choice[v]) is Verdict.DROP  # 1 s of prefill is cheaper than the disk for 100 s
    slow = replace(with_disk, cost=replace(FITTED.cost, prefill_seconds_per_token=1.0))
    choice = options(1000, slow, 100.0, price)
    assert min(choice, key=lambda v: choice[v]) is Verdict.SWAP_DISK


def test_swapped_kv_is_priced_again_as_host_memory_gets_tight() -> None:
    at_rest = options(1000, FITTED, 30.0, Prices(1.0, 0.01), tier=KvTier.HOST)
    squeezed = options(1000, FITTED, 30.0, Prices(1.0, 500.0), tier=KvTier.HOST)
    assert min(at_rest, key=lambda v: at_rest[v]) is Verdict.SWAP_HOST
    assert min(squeezed, key=lambda v: squeezed[v]) is Verdict.DROP
    assert Verdict.KEEP not in squeezed, "what is not on the device can not be kept there"


def test_what_is_on_disk_stays_there_though_the_disk_is_full() -> None:
    full = replace(FITTED, disk_capacity_bytes=GIB, disk_used_bytes=GIB)
    assert Verdict.SWAP_DISK in options(1000, full, 1.0, Prices(1.0, 1.0), tier=KvTier.DISK)
    assert Verdict.SWAP_DISK not in options(1000, full, 1.0, Prices(1.0, 1.0), tier=KvTier.DEVICE)


def test_without_room_in_the_host_tier_nothing_is_swapped_there() -> None:
    assert Verdict.SWAP_HOST not in options(1000, FITTED, 1.0, Prices(1.0, 0.0), host_room=False)
    assert Verdict.SWAP_HOST in options(1000, FITTED, 1.0, Prices(1.0, 0.0), host_room=False, tier=KvTier.HOST)


def test_an_engine_that_knows_no_directive_can_only_keep() -> None:
    bare = replace(FITTED, supported_directives=frozenset(), disk_capacity_bytes=GIB)
    assert set(options(1000, bare, 1.0, Prices(1.0, 0.0))) == {Verdict.KEEP}
    assert set(options(1000, bare, 1.0, Prices(1.0, 0.0), tier=KvTier.HOST)) == {Verdict.SWAP_HOST}


def test_others_in_the_batch_make_moving_and_recomputing_dearer_but_not_keeping() -> None:
    alone, crowded = (options(1000, FITTED, 1.0, Prices(1.0, 1.0), others) for others in (0, GIB))
    assert crowded[Verdict.KEEP] == alone[Verdict.KEEP]
    assert crowded[Verdict.DROP] > alone[Verdict.DROP]
    assert crowded[Verdict.SWAP_HOST] > alone[Verdict.SWAP_HOST]


@pytest.mark.parametrize("empty", [session(held_tokens=0), session(tier=KvTier.NONE)])
def test_a_session_that_holds_nothing_has_no_choices(empty: Session) -> None:
    assert weigh(empty, FITTED, 1.0, Prices(1.0, 1.0), 0, True) == []


def test_an_engine_that_has_measured_nothing_is_weighed_by_assumptions() -> None:
    assert all(cost > 0 for cost in options(1000, engine(), 1.0, Prices(1.0, 1.0)).values())


# -- changing one's mind


@pytest.mark.parametrize(
    ("keep_cost", "now", "chosen"),
    [
        (1.10, Verdict.KEEP, Verdict.KEEP),  # dearer, but by less than a fifth
        (1.24, Verdict.KEEP, Verdict.KEEP),
        (1.26, Verdict.KEEP, Verdict.SWAP_HOST),
        (1.10, Verdict.DROP, Verdict.SWAP_HOST),  # what is done now is no option any more
    ],
)
def test_a_verdict_changes_only_for_something_cheaper_by_the_margin(
    keep_cost: float, now: Verdict, chosen: Verdict
) -> None:
    weighed = [Weighed(Verdict.SWAP_HOST, 1.0), Weighed(Verdict.KEEP, keep_cost)]
    assert choose(weighed, now, hysteresis_ratio=0.2).verdict is chosen


@pytest.mark.parametrize(
    ("tier", "verdict"),
    [
        (KvTier.DEVICE, Verdict.KEEP),
        (KvTier.HOST, Verdict.SWAP_HOST),
        (KvTier.DISK, Verdict.SWAP_DISK),
        (KvTier.NONE, Verdict.DROP),
    ],
)
def test_without_a_verdict_the_place_is_the_verdict(tier: KvTier, verdict: Verdict) -> None:
    assert standing(session(tier=tier)) is verdict
    assert standing(session(tier=tier, verdict=Verdict.DROP)) is Verdict.DROP


def test_only_turns_that_are_computed_are_delayed() -> None:
    sessions = (
        session("a", held_tokens=10, phase=SessionPhase.RUNNING),
        session("b", held_tokens=20, phase=SessionPhase.IDLE),
        session("c", held_tokens=40, phase=SessionPhase.RUNNING, engine="e2"),
    )
    assert running_bytes(snapshot(sessions=sessions), engine()) == 10 * 1024


def test_what_waits_on_the_host_tier_while_ram_is_dear_goes_back_to_a_device_that_has_room_and_is_not_dropped() -> None:
    waits = session(tier=KvTier.HOST, held_tokens=1000)
    roomy, dear = engine(used_tokens=0), Prices(device=0.0, host=100.0)
    best, *_ = weigh(waits, roomy, 10.0, dear, 0, True, device_room=True)
    assert best.verdict is Verdict.KEEP
    assert {o.verdict for o in weigh(waits, roomy, 10.0, dear, 0, True)} == {Verdict.DROP, Verdict.SWAP_HOST}
    cheap = {o.verdict: o.cost for o in weigh(waits, roomy, 10.0, Prices(0.0, 0.0), 0, True, device_room=True)}
    assert cheap[Verdict.KEEP] == cheap[Verdict.SWAP_HOST], "where RAM costs nothing there is nothing to gain"


def test_a_device_takes_up_only_what_leaves_it_with_what_nobody_asks_for() -> None:
    books = Books.of(snapshot(), policy(), engine(used_tokens=800, capacity_tokens=1000))
    assert books.takes_up(session(held_tokens=100)) and not books.takes_up(session(held_tokens=101))
    books.enter(Verdict.KEEP, session(held_tokens=100, tier=KvTier.HOST))
    assert books.device_used_tokens == 900 and not books.takes_up(session(held_tokens=1))
    books.waiting_count = 1
    assert not books.takes_up(session(held_tokens=0))
