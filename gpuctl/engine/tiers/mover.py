"""Carries out the moves of a plan, counts and reports them, and sees to what fails.

Owns: what happens when a copy cannot be made or read: the session's KV counts as lost and is computed again; every
other session is untouched. Must not: decide moves (placement.py). On the engine's thread only.
"""

from __future__ import annotations

import logging

from ...directives import Outcome, OutcomeStatus
from ...reports import SessionMoved
from ..compute.runner import Runner
from ..errors import SwapError
from ..reporter import Reporter
from ..schedule.plan import Discard, Move, MoveDown, MoveIn, MoveOut, Share
from ..schedule.scheduler import Scheduler
from ..schedule.sequence import SessionId, Slot, Tier
from ..totals import Totals
from .swapper import Copied, Swapper

_log = logging.getLogger(__name__)
_NOTHING = Copied(0, 0)


class Mover:
    def __init__(
        self, runner: Runner, swapper: Swapper, scheduler: Scheduler, reporter: Reporter, totals: Totals
    ) -> None:
        self._runner = runner
        self._swapper = swapper
        self._scheduler = scheduler
        self._reporter = reporter
        self._totals = totals

    def carry_out(self, move: Move) -> bool:
        """Carry out one move. False where the session's KV was lost: its slices of this step must be left out."""
        try:
            match move:
                case Discard():
                    self._discard(move)
                case Share():
                    self._share(move)
                case MoveOut():
                    self._moved(move, Tier.DEVICE, move.tier, self._swapper.out(move))
                case MoveIn():
                    self._moved(move, move.tier, Tier.DEVICE, self._swapper.back(move))
                case MoveDown():
                    self._moved(move, move.tier, move.to_tier, self._swapper.down(move))
        except SwapError as error:
            self._lose(move, error)
            return False
        return True

    def note_failed_writes(self) -> None:
        """Copies that could not be written are gone from the books, too."""
        for tier, session_id, reason in self._swapper.take_failures():
            _log.error("copy_not_written tier=%s session=%s error=%r", tier.value, session_id, reason)
            self._totals.swap_failures += 1
            self._scheduler.copy_lost(session_id, tier)

    def _moved(self, move: MoveOut | MoveIn | MoveDown, from_tier: Tier, to_tier: Tier, copied: Copied) -> None:
        totals = self._totals
        if from_tier is Tier.DEVICE:
            totals.swap_out_count += 1
            totals.swap_out_bytes += copied.moved_bytes
            totals.swap_out_ns += copied.duration_ns
        elif to_tier is Tier.DEVICE:
            totals.swap_in_count += 1
            totals.swap_in_bytes += copied.moved_bytes
            totals.swap_in_ns += copied.duration_ns
        self._report(move.session_id, from_tier, to_tier, move.tokens, copied, move.directive_id)
        if move.directive_id:
            self._reporter.settle(Outcome(move.directive_id, OutcomeStatus.COMPLETED))

    def _share(self, move: Share) -> None:
        self._runner.share(move.source, move.slot, move.tokens)
        # The source may have been lost a moment ago, in this very plan: then there was nothing to share.
        held = self._runner.held_tokens(move.slot)
        if held != move.tokens:
            raise SwapError(f"{move.session_id}: {held} of {move.tokens} tokens could be shared")
        self._totals.shared_tokens += move.tokens

    def _discard(self, move: Discard) -> None:
        if move.tier is not Tier.DEVICE:
            self._swapper.discard(move.session_id, move.tier)
            return
        assert move.slot is not None
        dropped = self._runner.held_tokens(move.slot) - move.from_token
        self._runner.cut(move.slot, move.from_token)
        if move.from_token == 0 and dropped > 0:
            self._report(move.session_id, Tier.DEVICE, Tier.NONE, dropped, _NOTHING, move.directive_id)

    def _lose(self, move: Move, error: SwapError) -> None:
        _log.error("swap_failed session=%s error=%r", move.session_id, str(error))
        self._totals.swap_failures += 1
        slot: Slot | None = getattr(move, "slot", None)
        if slot is not None:
            self._runner.cut(slot, 0)
        self._swapper.discard_all(move.session_id)
        self._scheduler.lost(move.session_id)
        directive_id: str = getattr(move, "directive_id", "")
        if directive_id:
            self._reporter.settle(Outcome(directive_id, OutcomeStatus.REJECTED, str(error)))

    def _report(
        self, session_id: SessionId, from_tier: Tier, to_tier: Tier, tokens: int, copied: Copied, directive_id: str
    ) -> None:
        self._reporter.occupancy_due = True
        session = self._scheduler.sessions.get(session_id)
        if session is None:
            return  # forgotten with its last turn: nobody asks where it went
        self._reporter.report(
            SessionMoved(
                session_id=session_id,
                tenant_id=session.tenant_id,
                from_tier=from_tier.told_as,
                to_tier=to_tier.told_as,
                tokens=tokens,
                moved_bytes=copied.moved_bytes,
                duration_ns=copied.duration_ns,
                directive_id=directive_id,
            )
        )
