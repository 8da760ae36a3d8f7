"""KV held while a tool call ran, in bytes and byte-seconds, and how the two move together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from equipoise.policies.correlate import Covariance, device_bytes, held_bytes, meanwhile, spike
from equipoise.policies.model import KvMeanwhile, KvTier, SessionPhase
from equipoise.tests.policies.facts import call, engine, ns, session
from hypothesis import given
from hypothesis import strategies as st

ENGINE = engine(bytes_per_token=10)


def test_bytes_are_tokens_times_bytes_a_token() -> None:
    assert device_bytes(session(held_tokens=7), ENGINE) == 70
    assert device_bytes(session(held_tokens=7, tier=KvTier.HOST), ENGINE) == 0
    assert held_bytes(session(held_tokens=7, tier=KvTier.HOST), ENGINE) == 70
    assert held_bytes(session(held_tokens=7, tier=KvTier.NONE), ENGINE) == 0


def test_an_idle_session_pays_for_the_device_by_the_second() -> None:
    kv = meanwhile(KvMeanwhile(), session(held_tokens=7), ENGINE, ns(1), ns(3.5))
    assert kv == KvMeanwhile(held_bytes=70, idle_byte_seconds=175.0)


def test_a_session_that_computes_is_not_idle() -> None:
    kv = meanwhile(KvMeanwhile(), session(held_tokens=7, phase=SessionPhase.RUNNING), ENGINE, 0, ns(2))
    assert kv == KvMeanwhile(held_bytes=70)


def test_a_swapped_session_pays_for_host_memory_only() -> None:
    kv = meanwhile(KvMeanwhile(), session(held_tokens=7, tier=KvTier.HOST, host_bytes=64), ENGINE, 0, ns(2))
    assert kv == KvMeanwhile(held_bytes=70, host_byte_seconds=128.0)


def test_a_copy_kept_in_host_memory_costs_there_too() -> None:
    kv = meanwhile(KvMeanwhile(), session(held_tokens=7, host_bytes=64), ENGINE, 0, ns(1))
    assert (kv.idle_byte_seconds, kv.host_byte_seconds) == (70.0, 64.0)


def test_time_that_runs_backwards_costs_nothing() -> None:
    kv = meanwhile(KvMeanwhile(idle_byte_seconds=5.0), session(held_tokens=7), ENGINE, ns(3), ns(1))
    assert kv.idle_byte_seconds == 5.0


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(0, 1000)), min_size=1, max_size=20))
def test_the_integral_is_the_sum_of_its_pieces(steps: list[tuple[int, int]]) -> None:
    kv, at_ns, expected = KvMeanwhile(), 0, 0.0
    for duration_ns, tokens in steps:
        kv = meanwhile(kv, session(held_tokens=tokens), ENGINE, at_ns, at_ns + duration_ns)
        at_ns += duration_ns
        expected += duration_ns / 1e9 * tokens * 10
    assert kv.idle_byte_seconds == pytest.approx(expected)
    assert kv.held_bytes == max(tokens for _, tokens in steps) * 10


def test_a_spike_tells_the_kv_held_at_the_peak() -> None:
    made = call(used_mib=3, peak_ns=42, kv=KvMeanwhile(at_peak_bytes=70, idle_byte_seconds=9.0))
    assert spike(made).at_ns == 42
    assert spike(made).peak_bytes == 3 << 20
    assert (spike(made).kv_held_bytes, spike(made).kv_idle_byte_seconds) == (70, 9.0)


def correlation_by_hand(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Sum of products and of squares about the mean, in two passes."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    co = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return co, sum((x - mean_x) ** 2 for x in xs), sum((y - mean_y) ** 2 for y in ys)


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=2, max_size=50))
def test_the_running_covariance_equals_the_two_pass_one(pairs: list[tuple[int, int]]) -> None:
    running = Covariance()
    for x, y in pairs:
        running = running.observe(float(x), float(y))
    xs, ys = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    co, square_x, square_y = correlation_by_hand(xs, ys)
    assert running.count == len(pairs)
    assert running.co == pytest.approx(co, abs=1e-6)
    assert running.m2_x == pytest.approx(square_x, abs=1e-6)
    assert running.m2_y == pytest.approx(square_y, abs=1e-6)
    if square_x > 1e-6 and square_y > 1e-6:
        assert running.correlation == pytest.approx(co / (square_x * square_y) ** 0.5, abs=1e-6)


def test_series_that_move_together_correlate_fully() -> None:
    rising, falling = Covariance(), Covariance()
    for step in range(10):
        rising = rising.observe(step, 3 * step + 1)
        falling = falling.observe(step, -step)
    assert rising.correlation == pytest.approx(1.0)
    assert falling.correlation == pytest.approx(-1.0)


def test_a_series_that_does_not_move_has_no_correlation() -> None:
    still = Covariance().observe(1.0, 2.0).observe(1.0, 3.0)
    assert still.correlation is None
    assert Covariance().correlation is None


def test_large_byte_counts_keep_their_precision() -> None:
    running = Covariance()
    values = [float(10 * 2**40 + step * 4096) for step in range(100)]
    for value in values:
        running = running.observe(value, value)
    steps = [after - before for before, after in pairwise(values)]
    assert set(steps) == {4096.0}
    assert running.m2_x == pytest.approx(4096.0**2 * (100**3 - 100) / 12)
