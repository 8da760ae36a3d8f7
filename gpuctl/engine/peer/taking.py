"""Takes a session from another engine: room first, then its KV as a host copy, then its turn as a waiting one.

Owns: the sessions on their way in. Must not: speak gRPC (taking_rpc.py). On the engine's thread only. Until `confirm`
the session is the giver's: what came of it so far goes without a trace when the giver's stream ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..compute.kv_image import KvChunk, cut_to
from ..errors import HandoverError, RequestError
from ..live import LiveTurn, Sampled
from ..parts import EngineParts
from ..schedule.sequence import Session, SessionId, Sink, Turn
from .session_state import Offer, SessionState


@dataclass(slots=True, eq=False)
class Taking:
    """One session on its way in."""

    offer: Offer
    on_stop: Callable[[], None]
    """The engine stops: the giver has to go on by itself. Called on the engine's thread; must not block."""
    adopted: bool = False
    confirmed: bool = False
    live: LiveTurn | None = None


class Taker:
    def __init__(self, parts: EngineParts, away: Callable[[SessionId], bool]) -> None:
        """`away`: whether this engine gives the session to another one, or relays its turn."""
        self._parts = parts
        self._away = away
        self._takings: dict[SessionId, Taking] = {}

    def arriving(self, session_id: SessionId) -> bool:
        """Whether the session has come but is not ours yet."""
        taking = self._takings.get(session_id)
        return taking is not None and not taking.confirmed

    def accept(self, taking: Taking) -> None:
        """Set room aside. Raises HandoverError where this engine cannot have the session."""
        offer = taking.offer
        if offer.engine_id == self._parts.engine_id:
            raise HandoverError(
                f"session {offer.session_id}: an engine cannot hand a session to itself", status="INVALID_ARGUMENT"
            )
        if offer.session_id in self._takings or self._away(offer.session_id):
            raise HandoverError(
                f"session {offer.session_id} is being handed over already: wait for its end", status="ALREADY_EXISTS"
            )
        if not self._parts.runner.kv_format.takes(offer.kv_format):
            raise HandoverError(f"session {offer.session_id}: its KV is of another form: start both engines alike")
        self._check_known(offer)
        self._check_length(offer, offer.context_tokens)
        self._takings[offer.session_id] = taking
        self.reserve(taking, offer.held_tokens)

    def reserve(self, taking: Taking, tokens: int) -> None:
        """Have room in the nearest tier for the session's first `tokens`. Raises HandoverError where there is none."""
        ledger, session_id = self._parts.scheduler.ledger, taking.offer.session_id
        appended = tokens - ledger.reserved_tokens(session_id)
        if appended <= 0:
            return
        self._parts.scheduler.placement.shed(ledger.nearest(), appended)
        self._parts.settle_moves()
        if not ledger.lower or not ledger.room(ledger.nearest(), appended):
            name = ledger.nearest().value
            raise HandoverError(
                f"session {taking.offer.session_id}: {tokens * ledger.bytes_per_token} bytes of KV do not fit into the "
                f"{name} tier: raise --{name}-bytes",
                status="RESOURCE_EXHAUSTED",
            )
        ledger.reserve(session_id, tokens)

    def adopt(
        self, taking: Taking, state: SessionState, chunks: list[KvChunk], sink: Sink, follow: Callable[[Sampled], None]
    ) -> None:
        """Book what came and queue its turn. Raises HandoverError, with nothing changed but the room set aside.

        `sink` is told the turn's end, `follow` its tokens.
        """
        offer, scheduler, ledger = taking.offer, self._parts.scheduler, self._parts.scheduler.ledger
        self._check_known(offer)
        chunks = cut_to(chunks, state.kv_tokens)
        held_tokens = chunks[-1].end_token if chunks else 0
        if held_tokens != state.kv_tokens or held_tokens > len(state.session.tokens):
            raise HandoverError(
                f"session {offer.session_id}: KV of {held_tokens} tokens came, {state.kv_tokens} were told",
                status="DATA_LOSS",
            )
        session = replace(state.session, tokens=list(state.session.tokens), turn=None)
        live = self._live_of(offer, session, state, sink, follow)
        self.reserve(taking, held_tokens)
        if session.id not in scheduler.sessions and len(scheduler.sessions) >= self._parts.limits.max_sessions:
            scheduler.forget_oldest()
        scheduler.forget(session.id)  # an older one of the same name
        self._parts.settle_moves()
        ledger.reserve(session.id, 0)
        if chunks:
            self._parts.swapper.keep(session.id, ledger.nearest(), chunks)
            ledger.copied(session.id, ledger.nearest(), held_tokens)
        scheduler.sessions[session.id] = session
        if live is not None:
            scheduler.submit(session, live.turn)
            self._parts.accounts.enter(live.turn, state.spent)
            self._parts.live[session.id] = live
        elif session.anonymous:
            self._parts.by_text.add(session)
        taking.adopted, taking.live = True, live
        # At once: a daemon must learn where the session is before the giver says that it is gone.
        self._parts.reporter.report_occupancy(at_once=True)

    def confirm(self, taking: Taking) -> None:
        """The giver has forgotten the session: it is ours."""
        taking.confirmed = True

    def part(self, taking: Taking) -> None:
        """The giver's stream has ended: nobody waits for the turn any more. Safe at every stage, and again."""
        session_id = taking.offer.session_id
        if self._takings.get(session_id) is not taking:
            return
        del self._takings[session_id]
        self._parts.scheduler.ledger.reserve(session_id, 0)
        if not taking.adopted:
            return
        if not taking.confirmed:
            self._drop(taking)
        elif taking.live is not None:
            self._parts.cancel(taking.live.turn.id)

    def close(self) -> None:
        """The engine stops: the givers go on by themselves."""
        for taking in list(self._takings.values()):
            if taking.adopted and taking.live is not None:
                self._drop(taking)
                taking.on_stop()

    def _drop(self, taking: Taking) -> None:
        session_id = taking.offer.session_id
        live = self._parts.live.get(session_id)
        if live is not None and live is taking.live:
            del self._parts.live[session_id]
            live.sampler.close()
            self._parts.accounts.leave(live.turn)
            self._parts.scheduler.withdraw(session_id, self._parts.clock())
        session = self._parts.scheduler.sessions.get(session_id)
        if session is not None and session.turn is None:
            self._parts.scheduler.forget(session_id)
            self._parts.settle_moves()
        self._parts.reporter.occupancy_due = True
        self._parts.begin_next(session_id)

    def _check_known(self, offer: Offer) -> None:
        session = self._parts.scheduler.sessions.get(offer.session_id)
        if session is None:
            return
        if session.tenant_id != offer.tenant_id:
            raise HandoverError(
                f"session {offer.session_id} belongs to another tenant here", status="PERMISSION_DENIED"
            )
        if session.turn is not None:
            raise HandoverError(f"session {offer.session_id} has a turn under way here", status="ALREADY_EXISTS")

    def _check_length(self, offer: Offer, tokens: int) -> None:
        if tokens > self._parts.limits.longest_turn_tokens:
            raise HandoverError(
                f"session {offer.session_id} may need {tokens} tokens; at most "
                f"{self._parts.limits.longest_turn_tokens} fit: raise --kv-tokens or --slot-tokens",
                status="RESOURCE_EXHAUSTED",
            )

    def _live_of(
        self, offer: Offer, session: Session, state: SessionState, sink: Sink, follow: Callable[[Sampled], None]
    ) -> LiveTurn | None:
        if state.turn is None or state.request is None:
            self._check_length(offer, len(session.tokens))
            return None
        if len(self._parts.scheduler.waiting) >= self._parts.limits.max_queued_turns:
            raise HandoverError(
                f"{len(self._parts.scheduler.waiting)} turns are waiting here: try again later",
                status="RESOURCE_EXHAUSTED",
            )
        turn: Turn = replace(state.turn)
        self._check_length(offer, turn.prompt_tokens + turn.max_output_tokens)
        drawn = session.tokens[turn.prompt_tokens :]
        try:
            sampler = self._parts.runner.sampler(state.request.sampling, drawn)
        except RequestError as error:
            raise HandoverError(f"session {offer.session_id}: {error}") from None
        live = LiveTurn(state.request, turn, sink, sampler)
        live.catch_up(drawn, self._parts.model)
        live.follow = follow
        return live
