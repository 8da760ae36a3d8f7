"""What an engine has done since it started, added up: every part of the loop counts into one of these."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...policies.model import EngineTotals


@dataclass(slots=True)
class Totals:
    """Running totals since the engine started: those every engine tells (EngineTotals), and this one's own."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    swap_out_count: int = 0
    swap_out_bytes: int = 0
    swap_out_ns: int = 0
    swap_in_count: int = 0
    swap_in_bytes: int = 0
    swap_in_ns: int = 0
    preempted_count: int = 0

    steps: int = 0
    turns_finished: int = 0
    swap_failures: int = 0
    interrupted_steps: int = 0
    shared_tokens: int = 0

    def told(self) -> EngineTotals:
        """What the daemon is told of them."""
        return EngineTotals(**{name: getattr(self, name) for name in _TOLD})


_TOLD = tuple(field.name for field in fields(EngineTotals))
