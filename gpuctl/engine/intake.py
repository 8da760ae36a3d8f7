"""Takes turns in: maps a prompt onto its session, refuses what cannot be served, queues the rest.

Owns: the turns that wait behind another one of their session, and the limit of all that wait. Must not: choose among
them (scheduler.py) or compute. On the engine's thread only.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, replace

from .compute.conversation import map_prompt
from .errors import RequestError
from .live import LiveTurn
from .parts import EngineParts
from .schedule.sequence import Session, SessionId, Sink, Turn, TurnAccepted, TurnId, TurnRefused, TurnRequest
from .schedule.slo import begin_by_ns


@dataclass(frozen=True, slots=True)
class Submitted:
    """A turn as it was asked for."""

    turn_id: TurnId
    request: TurnRequest
    sink: Sink
    arrival_ns: int

    def refuse(self, error: RequestError) -> None:
        self.sink(TurnRefused(error))


class Intake:
    def __init__(self, parts: EngineParts, busy: Callable[[SessionId], bool], *, keep_anonymous: bool) -> None:
        """`busy`: whether a turn of the session is under way, here or in another engine.

        `keep_anonymous`: see EngineConfig.
        """
        self._parts = parts
        self._busy = busy
        self._keep_anonymous = keep_anonymous
        # A session computes one turn at a time; the next ones wait here in order of arrival.
        self._behind: dict[SessionId, collections.deque[Submitted]] = {}

    def take(self, submitted: Submitted) -> None:
        """Queue the turn, or refuse it; its client is told which."""
        scheduler, by_text = self._parts.scheduler, self._parts.by_text
        request = by_text.named(submitted.request, scheduler.sessions, keep=self._keep_anonymous)
        submitted = replace(submitted, request=request)
        if (full := self._queue_full()) is not None:
            submitted.refuse(full)
        elif self._busy(request.session_id):
            self._behind.setdefault(request.session_id, collections.deque()).append(submitted)
        else:
            self._begin(submitted)

    def _begin(self, submitted: Submitted) -> bool:
        try:
            live = self._queue(submitted)
        except RequestError as error:
            submitted.refuse(error)
            return False
        live.sink(TurnAccepted(live.turn.prompt_tokens, live.turn.session_id))
        self._parts.reporter.occupancy_due = True
        return True

    def begin_next(self, session_id: SessionId) -> None:
        """A turn of the session has ended here: begin the one that has waited longest for it, if any."""
        waiting = self._behind.get(session_id)
        while waiting and not self._busy(session_id) and not self._begin(waiting.popleft()):
            pass
        if waiting is not None and not waiting:
            self._behind.pop(session_id, None)

    def cancel(self, turn_id: TurnId) -> bool:
        """Forget a turn that waits behind another; whether it was one."""
        for session_id, waiting in self._behind.items():
            kept = collections.deque(submitted for submitted in waiting if submitted.turn_id != turn_id)
            if len(kept) != len(waiting):
                if kept:
                    self._behind[session_id] = kept
                else:
                    del self._behind[session_id]
                return True
        return False

    def refuse_waiting(self, error: RequestError) -> None:
        """Refuse every turn that waits behind another: no more is begun."""
        while self._behind:
            _, waiting = self._behind.popitem()
            for submitted in waiting:
                submitted.refuse(error)

    def _queue_full(self) -> RequestError | None:
        """The refusal of one more turn; None where it may wait. Turns behind another of their session count, too."""
        limit = self._parts.limits.max_queued_turns
        queued = len(self._parts.scheduler.waiting) + sum(map(len, self._behind.values()))
        if queued < limit:
            return None
        message = f"{queued} turns are waiting: try again later"
        return RequestError(message, status=429, kind="rate_limit_error", code="queue_full", retry_after_s=2)

    def _queue(self, submitted: Submitted) -> LiveTurn:
        """Map the prompt onto the session and queue the turn. Raises RequestError, with nothing changed."""
        parts, limits = self._parts, self._parts.limits
        scheduler = parts.scheduler
        # Another engine may have to go on with this sampling: the seed is drawn here, once.
        request = replace(submitted.request, sampling=submitted.request.sampling.seeded())
        session = scheduler.sessions.get(request.session_id)
        if session is None:
            session = Session(request.session_id, request.tenant_id, ephemeral=request.ephemeral)
        elif session.tenant_id != request.tenant_id:
            raise RequestError(
                f"session {request.session_id} belongs to another tenant", status=403, kind="permission_error"
            )
        prompt = map_prompt(parts.model, session, request.prompt)
        asked = len(prompt.tokens)
        room = limits.longest_turn_tokens - asked
        if not asked:
            raise RequestError("messages: the prompt is empty", param="messages")
        if room < 1:
            raise RequestError(
                f"the prompt has {asked} tokens; at most {limits.longest_turn_tokens} fit, output included",
                code="context_length_exceeded",
                param="messages",
            )
        sampler = parts.runner.sampler(request.sampling)
        if session.id not in scheduler.sessions and len(scheduler.sessions) >= limits.max_sessions:
            scheduler.forget_oldest()
        scheduler.diverged(session, prompt.common_tokens)
        session.tokens = prompt.tokens
        turn = Turn(
            id=submitted.turn_id,
            session_id=session.id,
            tenant_id=session.tenant_id,
            arrival_ns=submitted.arrival_ns,
            prompt_tokens=asked,
            max_output_tokens=min(request.max_tokens or limits.default_max_tokens, room),
        )
        turn.slo = request.slo
        turn.due_ns = begin_by_ns(turn, scheduler.cost, prompt.common_tokens)
        session.anonymous = request.anonymous
        parts.by_text.remove(session.id)
        scheduler.submit(session, turn)
        parts.swapper.read_ahead(session.id, scheduler.ledger.holding(session.id).longest()[0])
        parts.live[session.id] = live = LiveTurn(request, turn, submitted.sink, sampler)
        return live
