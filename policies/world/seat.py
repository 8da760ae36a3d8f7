"""A session's seat in the engine: where its KV is, which turn of it is computed, what its agent is doing meanwhile.

Owns the fields that rules look at and the engine changes. No behaviour beyond arithmetic on its own fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..model import KvTier, SessionId


class Stage(Enum):
    IDLE = "idle"
    """No turn: its agent runs tools, or has not come back yet."""
    WAITING = "waiting"
    """A turn has been asked for and has no room yet."""
    LOADING = "loading"
    """It has its room; KV is on its way, or room is still being made."""
    PREFILL = "prefill"
    DECODE = "decode"


COMPUTED = frozenset({Stage.LOADING, Stage.PREFILL, Stage.DECODE})
"""Stages in which a turn has its room on the device for good."""


@dataclass(slots=True)
class Seat:
    """Invariants: held_tokens is 0 exactly where the tier is NONE; no copy is longer than the context.

    Copies in lower tiers are prefixes of the context: they stay valid when it grows, and are cut when it shrinks.
    """

    number: int
    session: SessionId
    tenant: str
    weight: float = 1.0
    stage: Stage = Stage.IDLE
    tier: KvTier = KvTier.NONE
    context_tokens: int = 0
    """Of the conversation, whether any of it is held or not."""
    held_tokens: int = 0
    """In its tier."""
    host_tokens: int = 0
    """Prefix of which the host tier has a copy; all of held_tokens where that is its tier."""
    disk_tokens: int = 0
    """Likewise the disk."""
    turn: int = 0
    """Of its conversation, from 0."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    asked_s: float = 0.0
    """When the turn that waits, or is computed, was asked for."""
    ended_s: float = 0.0
    """When its last turn ended."""
    ready_s: float = 0.0
    """When all that it loads is there."""
    work_s: float = 0.0
    """Of prefill, still to do."""
    mark: float = 0.0
    """Steps of decoding after which its turn is over, as the engine counts them."""
    cached_tokens: int = 0
    """Of its prompt, what was held when its turn got its room."""
    again_tokens: int = 0
    """Of its prompt, what had been computed before and was computed again."""
    first_s: float = 0.0
    """When its turn's first token was drawn."""
    began_s: float = 0.0
    """When its turn got its room."""
    retain_until_s: float = 0.0
    hold_until_s: float = 0.0
    """Until then its next turn is not served: a daemon's word."""
    asleep: bool = False
    """Behind the door: its KV is gone and its turn waits until the awake leave room for it."""
    kind: str = ""
    """Of the tool call that its agent is in; empty: none."""
    call_since_s: float = 0.0
    call_lost_s: float = 0.0
    """Seconds of the call in which it stood."""

    @property
    def needs_tokens(self) -> int:
        """Room on the device for its turn, from the first token to the last."""
        return self.prompt_tokens + self.output_tokens

    @property
    def resumed(self) -> bool:
        return self.turn > 0
