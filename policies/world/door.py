"""The door: who is awake, so that what the awake need together fits device and host tier (working-set admission).

Owns who sleeps. Source of the idea: Denning, "The working set model for program behavior" (CACM 1968): admit another
program only if its working set fits beside those of the others, else they all thrash. A new session is let in, and an
awake one whose KV was lost goes on, only where the needs of the awake and their growth over the next turns fit a share
of the reach; the oldest first. Its wait counts in what is reported of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..model import KvTier
from .seat import Seat, Stage

TURNS_AHEAD = 8
"""Growth is reserved for so many turns of each of the awake."""
GROWTH_TOKENS = 1000.0
"""Of a turn, until turns have been seen."""
LEARNING = 0.02
"""Weight of the newest turn in the learned growth: some fifty turns are remembered."""


class Door:
    def __init__(self, share: float | None) -> None:
        """`share` of the reach that the awake may need; None: open."""
        self._share = share
        self._growth = GROWTH_TOKENS

    def grew(self, seat: Seat, tokens: int) -> None:
        """A turn made a conversation so much longer; a first one is a beginning and no growth."""
        if seat.resumed:
            self._growth += LEARNING * (max(0, tokens) - self._growth)

    def admits(self, seat: Seat, seats: Sequence[Seat], reach_tokens: float) -> bool:
        """Whether the turn that `seat` waits for may ask for room; puts it to sleep where it may not."""
        if self._share is None:
            return True
        room = self._share * reach_tokens
        others = [s for s in seats if s is not seat and self._awake(s)]
        if not seat.resumed or seat.asleep:
            if any(s.asleep and s.asked_s < seat.asked_s for s in seats if s is not seat):
                return False
            return not others or sum(map(self._need, others)) + self._need(seat) <= room
        if seat.tier is KvTier.NONE and others and sum(map(self._bare_need, [*others, seat])) > room:
            seat.asleep = True
            return False
        return True

    @staticmethod
    def _awake(seat: Seat) -> bool:
        """In the middle of a conversation, or its first turn is being computed."""
        return not seat.asleep and (seat.resumed or seat.stage not in (Stage.IDLE, Stage.WAITING))

    @staticmethod
    def _bare_need(seat: Seat) -> float:
        return max(seat.context_tokens, seat.needs_tokens if seat.stage is not Stage.IDLE else 0)

    def _need(self, seat: Seat) -> float:
        return self._bare_need(seat) + TURNS_AHEAD * self._growth
