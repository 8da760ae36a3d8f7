"""Hands sessions to other engines of the host and takes theirs: what the step loop and the peer service see of it.

Owns: that giving (giving.py) and taking (taking.py) of one session exclude each other. Must not: speak gRPC
(service.py). On the engine's thread only.

Who owns the session is never in doubt for long, and never twice: the giver's until it is told that the taker has
everything; then it forgets it, confirms, and is only the way its client's tokens take. A daemon hears of it from its
owner: the taker reports it when it has come, then the giver reports it gone. The end of its turn is reported by the
engine that computes its last token, its start by the one that admitted it, under one id.
"""

from __future__ import annotations

from ..errors import HandoverError
from ..parts import EngineParts
from ..schedule.sequence import SessionId, TurnId
from .giving import Giver, Giving
from .session_state import Offer
from .taking import Taker, Taking


class Handovers:
    def __init__(self, parts: EngineParts) -> None:
        self.giver = Giver(parts)
        self.taker = Taker(parts, self.giver.knows)

    def begin(self, giving: Giving) -> Offer:
        """Start to give. Raises HandoverError: see Giver.begin; also for a session that is just arriving."""
        if self.taker.arriving(giving.session_id):
            raise HandoverError(
                f"session {giving.session_id} is just arriving here: wait for its end", status="ALREADY_EXISTS"
            )
        return self.giver.begin(giving)

    def accept(self, taking: Taking) -> None:
        """Start to take. Raises HandoverError: see Taker.accept."""
        self.taker.accept(taking)

    # What the step loop asks

    def away(self, session_id: SessionId) -> bool:
        """Whether new turns of the session must wait: its turn is elsewhere, or may be."""
        return self.giver.away(session_id)

    @property
    def in_doubt(self) -> bool:
        """A session may be ours or another engine's: a daemon had better not be told just now."""
        return self.giver.in_doubt

    def cancel(self, turn_id: TurnId) -> None:
        """Pass a client's cancellation on to where its turn is. Safe for a turn nobody knows."""
        self.giver.cancel(turn_id)

    def close(self) -> None:
        """The engine stops."""
        self.taker.close()
        self.giver.close()
