"""The giving side's call: sends a session to another engine and relays the tokens of its turn.

Owns: the rounds of KV, the deadline, and the turn between its release and its end (`_relay`). Must not: touch the
engine's state except on its thread, through giving.py. Whatever breaks the call ends in `take_back`, handed to the
engine's thread after everything else of the call, so nothing can overtake it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from ....policies.accounting import TurnCost
from ...api.v1 import peer_pb2 as pb
from ...api.v1 import peer_pb2_grpc
from ..compute.kv_image import KvChunk
from ..engine import Engine
from ..engine_thread import fail, on_engine, settle, threadsafe
from ..errors import STOPPING, EngineError, HandoverError
from ..live import LiveTurn, token_of
from ..schedule.sequence import FinishReason, SessionId, finished
from . import wire as peer_wire
from .giving import Giving

_log = logging.getLogger(__name__)

# Copy once more while the turn goes on rather than pause it for more than this; but not for ever: a long prompt may be
# computed faster than it is copied.
_SMALL_TAIL_TOKENS = 64
_MAX_ROUNDS = 4

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_TakeCall = Any  # grpc.aio.StreamStreamCall[pb.SessionPart, pb.TakenEvent], which is generic in stubs only


class PeerGiver:
    """Hands sessions of one engine over; one `give` each."""

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        self._engine = engine
        self._fingerprint = fingerprint

    async def give(
        self, session_id: SessionId, to: str, timeout_ms: int, handed: asyncio.Future[pb.HandOverResponse]
    ) -> None:
        """Answer `handed` once the other engine has the session, or why it has not; return when its turn has ended."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancelled = asyncio.Event()
        giving = Giving(
            session_id,
            on_cancel=lambda: threadsafe(loop, cancelled.set),
            on_stop=lambda: threadsafe(loop, task.cancel),
        )
        giver = self._engine.handovers.giver
        try:
            async with grpc.aio.insecure_channel(to) as channel:
                call: _TakeCall = peer_pb2_grpc.EnginePeerServiceStub(channel).Take()
                try:
                    async with asyncio.timeout(timeout_ms / 1e3):
                        answer = await self._hand(giving, call, timeout_ms)
                except Exception as error:
                    reason = await _reason(error, call, to, timeout_ms)
                    call.cancel()
                    await on_engine(self._engine, lambda: giver.take_back(giving))
                    fail(handed, reason)
                    return
                settle(handed, answer)
                if giving.live is not None:
                    await self._relay(giving, giving.live, call, cancelled)
        finally:
            self._engine.call(lambda: giver.take_back(giving))
            fail(handed, HandoverError(STOPPING, status="UNAVAILABLE"))

    async def _hand(self, giving: Giving, call: _TakeCall, timeout_ms: int) -> pb.HandOverResponse:
        giver, began_ns = self._engine.handovers.giver, time.monotonic_ns()
        offer = await on_engine(self._engine, lambda: self._engine.handovers.begin(giving))
        await call.write(peer_wire.offer_message(offer, self._fingerprint, began_ns + timeout_ms * 1_000_000))
        await _expect(call, "ready")
        rounds, moved_bytes = 0, 0
        while rounds < _MAX_ROUNDS:
            moved_bytes += await _send_kv(call, await on_engine(self._engine, lambda: giver.copy(giving)))
            await call.write(pb.SessionPart(round_end=pb.RoundEnd()))
            await _expect(call, "ready")
            rounds += 1
            if await on_engine(self._engine, lambda: giver.behind_tokens(giving)) <= _SMALL_TAIL_TOKENS:
                break
        paused_ns = time.monotonic_ns()
        departure = await on_engine(self._engine, lambda: giver.release(giving))
        moved_bytes += await _send_kv(call, departure.chunks)
        await _send(call, peer_wire.state_messages(departure.state))
        committed = (await _expect(call, "committed")).committed
        ended_ns = time.monotonic_ns()
        await call.write(pb.SessionPart(confirm=pb.Confirm()))
        if departure.state.turn is None and await call.read() is not _EOF:
            # Hanging up is all that is left to do, and must not overtake the confirmation.
            raise HandoverError("the other engine did not end the call", status="UNAVAILABLE")
        await on_engine(self._engine, lambda: giver.departed(giving))
        return pb.HandOverResponse(
            engine_id=committed.engine_id,
            context_tokens=len(departure.state.session.tokens),
            held_tokens=departure.state.kv_tokens,
            moved_bytes=moved_bytes,
            duration_ns=ended_ns - began_ns,
            paused_ns=ended_ns - paused_ns,
            round_count=rounds,
            has_turn=departure.state.turn is not None,
        )

    async def _relay(self, giving: Giving, live: LiveTurn, call: _TakeCall, cancelled: asyncio.Event) -> None:
        """Pass the turn's tokens on to its client until it ends. The caller takes the turn back where it does not."""
        giver, session = self._engine.handovers.giver, giving.session
        assert session is not None
        passing_on = asyncio.create_task(_pass_on(cancelled, call))
        try:
            while (event := await call.read()) is not _EOF:
                if event.WhichOneof("event") == "done":
                    live.flush()
                    live.sink(peer_wire.done_from(event.done))
                    self._engine.call(lambda: giver.ended(giving))
                    return
                sampled = peer_wire.sampled_from(event.sampled)
                session.tokens.append(token_of(sampled))
                live.turn.output_tokens += 1
                live.turn.first_token_ns = live.turn.first_token_ns or time.monotonic_ns()
                giving.text_ended = live.take(sampled, self._engine.model)
            _log.warning("peer_lost session=%s: its turn goes on here", session.id)
        except grpc.aio.AioRpcError as error:
            _log.warning("peer_lost session=%s reason=%r: its turn goes on here", session.id, error.details())
        except asyncio.CancelledError:
            # This engine stops, and with it the client's stream: an end like any other would pass for the whole answer.
            live.flush()
            unknown = TurnCost()  # the other engine has its books
            engine_id, now_ns = self._engine.engine_id, time.monotonic_ns()
            live.sink(
                finished(
                    live.turn,
                    FinishReason.ERROR,
                    unknown,
                    session.cost,
                    now_ns=now_ns,
                    engine_id=engine_id,
                    error=STOPPING,
                )
            )
            self._engine.call(lambda: giver.ended(giving))
            raise
        finally:
            passing_on.cancel()
            call.cancel()


async def _expect(call: _TakeCall, kind: str) -> pb.TakenEvent:
    event = await call.read()
    if event is _EOF or event.WhichOneof("event") != kind:
        raise HandoverError(f"the other engine did not answer {kind}", status="UNAVAILABLE")
    assert isinstance(event, pb.TakenEvent)
    return event


async def _send(call: _TakeCall, messages: Iterable[pb.SessionPart]) -> None:
    for message in messages:
        await call.write(message)


def _messages(chunk: KvChunk) -> list[pb.SessionPart]:
    return list(peer_wire.kv_messages(chunk))


async def _send_kv(call: _TakeCall, chunks: Iterable[KvChunk]) -> int:
    """Bytes of KV sent."""
    sent = 0
    for chunk in chunks:
        # Joining pieces and reckoning checksums let go of the interpreter now and then only: not on this loop.
        messages = await asyncio.to_thread(_messages, chunk)
        await _send(call, messages)
        sent += messages[0].blob.total_bytes
    return sent


async def _pass_on(cancelled: asyncio.Event, call: _TakeCall) -> None:
    await cancelled.wait()
    try:
        await call.write(pb.SessionPart(cancel=pb.CancelTurn()))
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call has ended; who reads it takes the turn back and ends it


async def _reason(error: Exception, call: _TakeCall, to: str, timeout_ms: int) -> HandoverError:
    """Why handing over failed, in one line."""
    if isinstance(error, asyncio.InvalidStateError | grpc.aio.AioRpcError) and call.done():
        return _refusal(to, await call.code(), await call.details())
    match error:
        case HandoverError():
            return error
        case TimeoutError():
            return HandoverError(
                f"{to}: did not have the session within {timeout_ms / 1e3:g} s: give more time",
                status="DEADLINE_EXCEEDED",
            )
        case EngineError():
            return HandoverError(str(error), status="INTERNAL")
    _log.error("handover_failed to=%s", to, exc_info=error)
    return HandoverError(f"{to}: {error!r}", status="INTERNAL")


def _refusal(to: str, code: grpc.StatusCode, details: str | None) -> HandoverError:
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in (details or ""):
        return HandoverError(f"{to}: no engine answers there: is one started with --peer {to}?", status=code.name)
    return HandoverError(f"{to}: {details or code.name}", status=code.name)
