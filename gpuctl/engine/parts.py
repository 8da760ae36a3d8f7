"""The parts of an engine that its step, its intake and its hand-overs all work on.

Owns: their names. Must not: do anything of its own. All of it belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .compute.language_model import LanguageModel
from .compute.runner import Runner
from .live import LiveTurn
from .reporter import Reporter
from .schedule.scheduler import Scheduler
from .schedule.sequence import FinishReason, SessionId, TurnId
from .schedule.session_index import SessionIndex
from .tiers.mover import Mover
from .tiers.swapper import Swapper
from .totals import Totals
from .turn_cost import Accounts


@dataclass(frozen=True, slots=True)
class Limits:
    longest_turn_tokens: int
    max_queued_turns: int
    max_sessions: int
    default_max_tokens: int


class Finish(Protocol):
    def __call__(self, live: LiveTurn, reason: FinishReason, error: str | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    engine_id: str
    model: LanguageModel
    runner: Runner
    scheduler: Scheduler
    swapper: Swapper
    mover: Mover
    reporter: Reporter
    accounts: Accounts
    totals: Totals
    by_text: SessionIndex
    live: dict[SessionId, LiveTurn]
    limits: Limits
    finish: Finish
    cancel: Callable[[TurnId], None]
    begin_next: Callable[[SessionId], None]
    clock: Callable[[], int]

    def settle_moves(self) -> None:
        """Carry out now what was decided at this step border, so that the books say what is."""
        for move in self.scheduler.placement.take_moves():
            self.mover.carry_out(move)
