"""Past-Future admission: will the batch still fit when its turns have grown to their likely ends?

Owns: the recent distribution of output lengths and the peak estimate. Must not: admit (scheduler.py).
Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025): with the running turns
sorted by remaining length, descending, memory peaks at one of their ends:
peak = max_i(left_i x i + sum_{j<=i} has_run_j).
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Iterable


class OutputLengths:
    """The output lengths of the last `window` turns, kept sorted."""

    def __init__(self, window: int = 256) -> None:
        self._recent: collections.deque[int] = collections.deque(maxlen=window)
        self._sorted: list[int] = []

    def add(self, output_tokens: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._sorted.pop(bisect.bisect_left(self._sorted, self._recent[0]))
        self._recent.append(output_tokens)
        bisect.insort(self._sorted, output_tokens)

    def remaining(self, output_tokens: int, limit_tokens: int, quantile: float = 0.8) -> int:
        """Likely output tokens still to come of a turn that has produced `output_tokens` of at most `limit_tokens`.

        The quantile of the recent turns that went further than this one; the limit where none did (or none is known).
        """
        longer = self._sorted[bisect.bisect_right(self._sorted, output_tokens) :]
        if not longer:
            return limit_tokens - output_tokens
        expected = longer[min(len(longer) - 1, int(quantile * len(longer)))]
        return min(expected, limit_tokens) - output_tokens


def peak_tokens(turns: Iterable[tuple[int, int]]) -> int:
    """Largest KV the turns hold together on their way; each is (tokens held now, tokens still to come)."""
    held_total = 0
    peak = 0
    for rank, (held, left) in enumerate(sorted(turns, key=lambda turn: -turn[1]), start=1):
        held_total += held
        peak = max(peak, left * rank + held_total)
    return peak
