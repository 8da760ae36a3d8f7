"""Gives a session to another engine: live copies of its KV while its turn goes on, then a pause, the rest, and goodbye.

Owns: the sessions on their way out, and the turns that another engine computes for a client of ours. Must not: speak
gRPC (giving_rpc.py). On the engine's thread only, but for a released `Giving`: its caller's until it is taken back.

A session is ours until `departed`: whatever fails before, `take_back` resumes its turn from the KV kept on the host;
afterwards from its tokens, computed again.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from ..compute.kv_image import KvChunk, from_token
from ..errors import HandoverError, RequestError, SwapError
from ..live import LiveTurn
from ..parts import EngineParts
from ..schedule.sequence import FinishReason, Session, SessionId, Tier, Token, TurnId, common_prefix
from ..turn_cost import Spent
from .session_state import Offer, SessionState

_log = logging.getLogger(__name__)


class Stage(enum.Enum):
    COPYING = "copying"
    """The turn goes on here."""
    IN_DOUBT = "in doubt"
    """Paused and sent; the other engine has not said that it has it."""
    RELAYING = "relaying"
    """The other engine computes the turn; its tokens come through here."""


@dataclass(slots=True, eq=False)
class Giving:
    """One session on its way out."""

    session_id: SessionId
    on_cancel: Callable[[], None]
    """The client of the released turn went away. Called on the engine's thread; must not block."""
    on_stop: Callable[[], None]
    """The engine stops while the turn is relayed: end the client's stream. Likewise."""
    stage: Stage = Stage.COPYING
    sent: list[Token] = field(default_factory=list)
    """The tokens whose KV has been handed out."""
    session: Session | None = None
    live: LiveTurn | None = None
    """The released turn. What the other engine samples is added to both by whoever relays it."""
    spent: Spent = field(default_factory=Spent)
    """What computing the released turn has cost here."""
    text_ended: bool = False
    """The last relayed token ended the text."""
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Departure:
    """What is left to send once the turn has paused."""

    chunks: list[KvChunk]
    state: SessionState


class Giver:
    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._givings: dict[SessionId, Giving] = {}

    def away(self, session_id: SessionId) -> bool:
        """Whether the session's turn is released: its next ones wait."""
        giving = self._givings.get(session_id)
        return giving is not None and giving.stage is not Stage.COPYING

    def knows(self, session_id: SessionId) -> bool:
        """Whether the session is on its way out, or its turn is relayed."""
        return session_id in self._givings

    @property
    def in_doubt(self) -> bool:
        return any(giving.stage is Stage.IN_DOUBT for giving in self._givings.values())

    def begin(self, giving: Giving) -> Offer:
        """Start. Raises HandoverError where there is no such session or it is on its way already."""
        if giving.session_id in self._givings:
            raise HandoverError(
                f"session {giving.session_id} is being handed over already: wait for its end", status="ALREADY_EXISTS"
            )
        session = self._session(giving)
        self._givings[giving.session_id] = giving
        tier, held_tokens = self._parts.scheduler.ledger.holding(session.id).longest()
        self._parts.swapper.read_ahead(session.id, tier)
        return Offer(
            session_id=session.id,
            tenant_id=session.tenant_id,
            engine_id=self._parts.engine_id,
            context_tokens=len(session.tokens),
            held_tokens=held_tokens,
            kv_format=self._parts.runner.kv_format,
        )

    def copy(self, giving: Giving) -> list[KvChunk]:
        """The KV computed since the last call; the turn goes on. Raises HandoverError or SwapError."""
        session = self._session(giving)
        chunks = self._collect(session, common_prefix(giving.sent, session.tokens), empty_device=False)
        self._note_sent(giving, session, chunks)
        return chunks

    def behind_tokens(self, giving: Giving) -> int:
        """Tokens held that the last copy did not have."""
        held_tokens = self._parts.scheduler.ledger.holding(giving.session_id).longest()[1]
        return max(0, held_tokens - len(giving.sent))

    def release(self, giving: Giving) -> Departure:
        """Pause the turn and let go of it. Raises HandoverError, the turn then going on here."""
        session = self._session(giving)
        self._require_room(session)
        live = self._parts.live.pop(session.id, None)
        turn = session.turn
        if turn is not None:
            self._parts.scheduler.withdraw(session.id, self._parts.clock())
            giving.spent = self._parts.accounts.leave(turn)
        giving.session, giving.live, giving.stage = session, live, Stage.IN_DOUBT
        common = common_prefix(giving.sent, session.tokens)
        del giving.sent[common:]
        try:
            chunks = self._collect(session, common, empty_device=True)
        except SwapError as error:
            _log.warning("handover_tail_lost session=%s error=%r", session.id, str(error))
            chunks = []  # the other engine computes it again
        self._note_sent(giving, session, chunks)
        request = live.request if live is not None else None
        return Departure(chunks, SessionState(session, len(giving.sent), turn, request, giving.spent))

    def departed(self, giving: Giving) -> None:
        """The other engine has it: forget its KV in every tier."""
        if self._givings.get(giving.session_id) is not giving:
            return
        self._parts.scheduler.forget(giving.session_id)
        self._parts.settle_moves()
        self._parts.reporter.occupancy_due = True
        if giving.live is None:
            self.ended(giving)
        else:
            giving.stage = Stage.RELAYING
            giving.live.sampler.close()

    def ended(self, giving: Giving) -> None:
        """The relayed turn has ended. Turns that waited behind it begin here, from nothing."""
        if self._givings.get(giving.session_id) is giving:
            del self._givings[giving.session_id]
            self._parts.begin_next(giving.session_id)

    def take_back(self, giving: Giving) -> None:
        """It did not work out: the session is ours as before and its turn goes on. Safe at every stage, and again."""
        if self._givings.get(giving.session_id) is not giving:
            return
        del self._givings[giving.session_id]
        if giving.stage is Stage.COPYING:
            return
        if giving.live is None:
            self._parts.begin_next(giving.session_id)
            return
        self._resume(giving, giving.live)

    def cancel(self, turn_id: TurnId) -> None:
        for giving in self._givings.values():
            if giving.live is not None and giving.live.turn.id == turn_id:
                giving.cancelled = True
                giving.on_cancel()
                return

    def close(self) -> None:
        """The engine stops: what is in doubt is ours to end, what is relayed its relay's."""
        for giving in list(self._givings.values()):
            if giving.stage is Stage.RELAYING:
                giving.on_stop()
            else:
                self.take_back(giving)

    def _session(self, giving: Giving) -> Session:
        session = self._parts.scheduler.sessions.get(giving.session_id)
        if session is None:
            raise HandoverError(f"session {giving.session_id}: not known to this engine", status="NOT_FOUND")
        return session

    def _note_sent(self, giving: Giving, session: Session, chunks: list[KvChunk]) -> None:
        if chunks:
            giving.sent = session.tokens[: chunks[-1].end_token]

    def _require_room(self, session: Session) -> None:
        ledger = self._parts.scheduler.ledger
        tier, tokens = ledger.holding(session.id).longest()
        name = ledger.nearest().value
        if tier is Tier.DEVICE and not self._parts.scheduler.placement.fits(session, ledger.nearest(), tokens):
            raise HandoverError(
                f"session {session.id}: no room in the {name} tier for a copy of {tokens * ledger.bytes_per_token} "
                f"bytes: raise --{name}-bytes",
                status="RESOURCE_EXHAUSTED",
            )
        self._parts.settle_moves()

    def _collect(self, session: Session, token: int, *, empty_device: bool) -> list[KvChunk]:
        """The longest copy from `token` on. What the device holds is copied to the nearest tier, or moved there.

        Raises HandoverError where that has no room, SwapError where the copy cannot be read.
        """
        scheduler, swapper = self._parts.scheduler, self._parts.swapper
        self._parts.settle_moves()
        holding, nearest = scheduler.ledger.holding(session.id), scheduler.ledger.nearest()
        tier, tokens = holding.longest()
        if tier is Tier.DEVICE and empty_device:
            scheduler.placement.evict(session, nearest)
            self._parts.settle_moves()
        elif tier is Tier.DEVICE:
            assert holding.slot is not None
            self._require_room(session)
            swapper.copy(session.id, holding.slot, nearest, tokens, holding.copy_tokens(nearest))
            scheduler.ledger.copied(session.id, nearest, tokens)
        tier, tokens = scheduler.ledger.holding(session.id).longest()
        if tier is Tier.DEVICE:  # as long a copy below it, but the device is nearer
            tier = nearest
        return from_token(swapper.pieces(session.id, tier, tokens), token) if tokens > token else []

    def _resume(self, giving: Giving, live: LiveTurn) -> None:
        session, scheduler = giving.session, self._parts.scheduler
        assert session is not None
        if session.id not in scheduler.sessions and len(scheduler.sessions) >= self._parts.limits.max_sessions:
            scheduler.forget_oldest()
        scheduler.submit(session, live.turn)
        self._parts.accounts.enter(live.turn, giving.spent)
        self._parts.live[session.id] = live
        self._parts.reporter.occupancy_due = True
        if giving.cancelled:
            self._parts.finish(live, FinishReason.CANCELLED)
        elif giving.text_ended:
            self._parts.finish(live, FinishReason.STOP)
        elif live.turn.output_tokens >= live.turn.max_output_tokens:
            self._parts.finish(live, FinishReason.LENGTH)
        elif giving.stage is Stage.RELAYING:
            try:
                drawn = session.tokens[live.turn.prompt_tokens :]
                live.sampler = self._parts.runner.sampler(live.request.sampling, drawn)
            except RequestError as error:
                self._parts.finish(live, FinishReason.ERROR, str(error))
