"""What of a session goes from one engine to another beside its KV.

Owns: the shapes, and the parts of an engine that giving and taking work on. Must not: know of sockets (peer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .kv_image import KvFormat
from .language_model import LanguageModel
from .live import LiveTurn
from .mover import Mover
from .reporter import Reporter
from .runner import Runner
from .scheduler import Scheduler
from .sequence import FinishReason, Session, SessionId, TenantId, Turn, TurnId, TurnRequest
from .session_index import SessionIndex
from .swapper import Swapper
from .turn_cost import Accounts, Spent


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


@dataclass(frozen=True, slots=True)
class Limits:
    longest_turn_tokens: int
    max_queued_turns: int
    max_sessions: int


class Finish(Protocol):
    def __call__(self, live: LiveTurn, reason: FinishReason, error: str | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What handing over needs of an engine; all of it belongs to the engine's thread."""

    engine_id: str
    model: LanguageModel
    runner: Runner
    scheduler: Scheduler
    swapper: Swapper
    mover: Mover
    reporter: Reporter
    accounts: Accounts
    by_text: SessionIndex
    live: dict[SessionId, LiveTurn]
    limits: Limits
    finish: Finish
    cancel: Callable[[TurnId], None]
    next_behind: Callable[[SessionId], None]
    clock: Callable[[], int]

    def settle_moves(self) -> None:
        """Carry out now what was decided at this step border, so that the books say what is."""
        for move in self.scheduler.placement.take_moves():
            self.mover.carry_out(move)
