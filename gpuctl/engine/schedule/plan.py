"""What the scheduler hands the engine: one step's moves of KV and one batch.

Owns: the shapes only. Must not: carry anything the engine would have to interpret.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .sequence import SessionId, Slot, Tier


@dataclass(frozen=True, slots=True)
class MoveOut:
    """Copy the device KV to `tier` (from `valid_tokens` on: what lies before is there already) and free the slot."""

    session_id: SessionId
    slot: Slot
    tier: Tier
    tokens: int
    valid_tokens: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class MoveIn:
    """Fill the slot from the copy in `tier`."""

    session_id: SessionId
    slot: Slot
    tier: Tier
    tokens: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class MoveDown:
    """Move the copy in `tier` to `to_tier` (from `valid_tokens` on: what lies before is there already)."""

    session_id: SessionId
    tier: Tier
    to_tier: Tier
    tokens: int
    valid_tokens: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """Let `slot` use the cells of the first `tokens` of `source`."""

    session_id: SessionId
    source: Slot
    slot: Slot
    tokens: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget KV: on the device from `from_token` on, or a whole copy in another tier. Slot None: nothing on device."""

    session_id: SessionId
    slot: Slot | None
    from_token: int
    tier: Tier
    directive_id: str = ""


Move = MoveOut | MoveIn | MoveDown | Share | Discard


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute `count` tokens of the session from position `start`; sample the next one if the slice reaches the end."""

    session_id: SessionId
    slot: Slot
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class PreemptedTurn:
    session_id: SessionId
    to_tier: Tier
    directive_id: str = ""


@dataclass(slots=True)
class StepPlan:
    """What the engine does next, in this order: moves, then the batch."""

    moves: list[Move] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    admitted: list[SessionId] = field(default_factory=list)
    preempted: list[PreemptedTurn] = field(default_factory=list)
    forgotten: list[SessionId] = field(default_factory=list)
    wake_ns: int | None = None
    """When something changes by itself although nothing arrives."""
