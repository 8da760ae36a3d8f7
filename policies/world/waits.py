"""How long the tool calls of a world are expected to go on, as the policies' own estimates learn it.

Owns one `Estimates` and the answers already given: a rule asks for every idle session at every eviction.
"""

from __future__ import annotations

from ..estimate import Estimates
from ..model import NS_PER_S

_STEPS_PER_S = 4
"""Answers are kept by elapsed time in quarters of a second: buckets of a log2 histogram are no finer."""


class Waits:
    def __init__(self) -> None:
        self._estimates = Estimates()
        self._known: dict[tuple[str, int], float] = {}

    def observe(self, kind: str, seconds: float, peak_bytes: int) -> None:
        """A call of this kind took so long."""
        self._estimates = self._estimates.observe(kind, int(seconds * NS_PER_S), peak_bytes)
        self._known = {key: wait for key, wait in self._known.items() if key[0] != kind}

    def residual_s(self, kind: str, elapsed_s: float) -> float:
        """Seconds that a call which has run for `elapsed_s` is expected to run on."""
        key = (kind, int(elapsed_s * _STEPS_PER_S))
        if key not in self._known:
            elapsed_ns = key[1] * NS_PER_S // _STEPS_PER_S
            self._known[key] = self._estimates.mean_residual_s(kind, elapsed_ns)
        return self._known[key]
