"""What computing and copying cost here: the core's cost model, and what only this engine's own reckoning needs.

Owns: the arithmetic of a step's time (for paces, SLOs and a turn's ideal time). Must not: measure (cost.py).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from ....policies.model import CostModel


@dataclass(frozen=True, slots=True)
class CostFigures(CostModel):
    """Speeds measured on this machine; 0 where not measured. The daemon is told the CostModel in it."""

    decode_seconds_per_context_token: float = 0.0
    """What each token of context adds to a decode step: reading its KV."""

    def prefill_tokens_within(self, seconds: float, held_tokens: int = 0) -> int:
        """Most tokens after the first `held_tokens` that `prefill_seconds` says are computed within `seconds`.

        The root of b n^2 + (a + 2 b held) n = seconds; without measured figures as many as one likes (sys.maxsize).
        """
        if seconds <= 0:
            return 0
        per_pair = self.prefill_seconds_per_token2
        linear = self.prefill_seconds_per_token + 2 * per_pair * held_tokens
        if linear + per_pair <= 0:
            return sys.maxsize
        # The form that does not subtract nearly equal numbers where b is small.
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * per_pair * seconds)))

    def decode_seconds(self, sequences: int) -> float:
        """Seconds of a step that computes one token each of so many sequences; 0 for none."""
        return self.decode_step_seconds + (sequences - 1) * self.decode_seconds_per_sequence if sequences else 0.0
