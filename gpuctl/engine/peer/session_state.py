"""What of a session goes from one engine to another beside its KV.

Owns: the shapes. Must not: know of sockets (wire.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..compute.kv_image import KvFormat
from ..schedule.sequence import Session, SessionId, TenantId, Turn, TurnRequest
from ..turn_cost import Spent


@dataclass(frozen=True, slots=True)
class Offer:
    """What a taker must know before anything is sent."""

    session_id: SessionId
    tenant_id: TenantId
    engine_id: str
    context_tokens: int
    held_tokens: int
    kv_format: KvFormat


@dataclass(frozen=True, slots=True)
class SessionState:
    """All of a session but its KV."""

    session: Session
    """Its `turn` is not looked at."""
    kv_tokens: int
    """Of the KV sent, what lies before this token is still that of the conversation."""
    turn: Turn | None = None
    request: TurnRequest | None = None
    """The turn's, with the seed really used."""
    spent: Spent = field(default_factory=Spent)
    """What computing the turn has cost so far."""
