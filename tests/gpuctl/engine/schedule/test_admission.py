"""What the batch will hold at most, by the lengths of outputs seen."""

from __future__ import annotations

from equipoise.gpuctl.engine.schedule.admission import OutputLengths, peak_tokens
from hypothesis import given
from hypothesis import strategies as st


@given(turns=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=8))
def test_the_past_future_peak_is_the_largest_sum_ever_held(turns):
    """Against the definition: all grow one token a step, a turn's KV is freed when it ends."""
    peak = held_now = sum(held for held, _ in turns)
    live = list(turns)
    while live:
        live = [(held + 1, left - 1) for held, left in live if left > 0]
        held_now = sum(held for held, _ in live)
        peak = max(peak, held_now)
    assert peak_tokens(turns) == peak


def test_remaining_output_follows_the_turns_that_went_further():
    lengths = OutputLengths(window=4)
    assert lengths.remaining(0, 100) == 100
    for length in (10, 10, 10, 90):
        lengths.add(length)
    assert lengths.remaining(0, 100, quantile=0.5) == 10
    assert lengths.remaining(20, 100, quantile=0.5) == 70
    assert lengths.remaining(95, 100) == 5
    for _ in range(4):
        lengths.add(5)
    assert lengths.remaining(0, 100, quantile=0.9) == 5
