"""The peer service of an engine: sessions to and from other engines of the host, over unix sockets.

Owns: the socket, the calls, their deadlines, and the tokens of a turn on their way back to its client (`_relay`).
Must not: touch the engine's state except on its thread, through giving.py and taking.py. Whatever breaks a call ends in
`take_back` on the giving side and in `part` on the taking side; both are handed to the engine's thread after
everything else of that call, so nothing can overtake them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from ..api.v1 import peer_pb2 as pb
from ..api.v1 import peer_pb2_grpc
from . import peer_wire
from .engine import Engine
from .errors import EngineError, HandoverError, ListenError
from .giving import Giving
from .kv_image import KvChunk, cut_to
from .live import LiveTurn, token_of
from .sequence import FinishReason, SessionId, TurnEvent, TurnFinished
from .session_state import SessionState
from .taking import Taking

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

DEFAULT_TIMEOUT_MS = 30_000
MAX_TIMEOUT_MS = 3_600_000
# Copy once more while the turn goes on rather than pause it for more than this; but not for ever: a long prompt may be
# computed faster than it is copied.
_SMALL_TAIL_TOKENS = 64
_MAX_ROUNDS = 4

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_TakeCall = Any  # grpc.aio.StreamStreamCall[pb.SessionPart, pb.TakenEvent], which is generic in stubs only


def socket_path(address: str) -> Path:
    """The path of `unix:/path`. Raises HandoverError for any other address."""
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise HandoverError(f"{address}: give a peer address such as unix:/run/a.sock", status="INVALID_ARGUMENT")
    return Path(path)


class PeerService(peer_pb2_grpc.EnginePeerServiceServicer):
    """Serves one engine's peers. Used within one event loop."""

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        """`fingerprint`: of the model and the build, equal where KV can be exchanged."""
        self._engine = engine
        self._fingerprint = fingerprint
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._path: Path | None = None

    async def start(self, address: str) -> None:
        """Listen at `unix:/path`, which only this user can open. Raises ListenError."""
        try:
            self._path = socket_path(address)
        except HandoverError as error:
            raise ListenError(f"--peer {error}") from None
        _clear(self._path)
        self._server = grpc.aio.server()
        peer_pb2_grpc.add_EnginePeerServiceServicer_to_server(self, self._server)
        # Set before the socket exists: changed after, anybody could have connected in between.
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:
            raise ListenError(f"--peer {address}: cannot listen there: give a path in a folder of yours") from None
        finally:
            os.umask(mask)
        await self._server.start()

    async def stop(self) -> None:
        """End what is under way: relayed turns end as cancelled, givers are told to go on by themselves."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace=0.5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _on_engine(self, function: Callable[[], _T]) -> _T:
        """Run on the engine's thread at the next step border; its result or its error."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:  # whatever it is belongs to the call, not to the engine's loop
                failed = error
                _threadsafe(loop, lambda: _settle(answer, None, failed))
            else:
                _threadsafe(loop, lambda: _settle(answer, result, None))

        self._engine.call(run)
        return await answer

    # Giving

    async def HandOver(
        self, request: pb.HandOverRequest, context: grpc.aio.ServicerContext[pb.HandOverRequest, pb.HandOverResponse]
    ) -> pb.HandOverResponse:
        try:
            return await self.hand_over(SessionId(request.session_id), request.to, request.timeout_ms)
        except HandoverError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
            raise

    async def hand_over(self, session_id: SessionId, to: str, timeout_ms: int = 0) -> pb.HandOverResponse:
        """Hand the session over; the answer once the other engine has it. Raises HandoverError.

        A caller that goes away does not stop it.
        """
        if not 0 <= timeout_ms <= MAX_TIMEOUT_MS:
            raise HandoverError(f"timeout_ms: {timeout_ms}: give at most an hour", status="INVALID_ARGUMENT")
        path = socket_path(to)
        if self._path is not None and path.exists() and path.samefile(self._path):
            raise HandoverError(f"{to}: an engine cannot hand a session to itself", status="INVALID_ARGUMENT")
        handed: asyncio.Future[pb.HandOverResponse] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._give(session_id, to, timeout_ms or DEFAULT_TIMEOUT_MS, handed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(handed)

    async def _give(
        self, session_id: SessionId, to: str, timeout_ms: int, handed: asyncio.Future[pb.HandOverResponse]
    ) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancelled = asyncio.Event()
        giving = Giving(
            session_id,
            on_cancel=lambda: _threadsafe(loop, cancelled.set),
            on_stop=lambda: _threadsafe(loop, task.cancel),
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
                    await self._on_engine(lambda: giver.take_back(giving))
                    _settle(handed, None, reason)
                    return
                _settle(handed, answer, None)
                if giving.live is not None:
                    await self._relay(giving, giving.live, call, cancelled)
        finally:
            self._engine.call(lambda: giver.take_back(giving))
            _settle(handed, None, HandoverError("the engine is stopping", status="UNAVAILABLE"))

    async def _hand(self, giving: Giving, call: _TakeCall, timeout_ms: int) -> pb.HandOverResponse:
        giver, began_ns = self._engine.handovers.giver, time.monotonic_ns()
        offer = await self._on_engine(lambda: self._engine.handovers.begin(giving))
        await call.write(peer_wire.offer_message(offer, self._fingerprint, began_ns + timeout_ms * 1_000_000))
        await _expect(call, "ready")
        rounds, moved_bytes = 0, 0
        while rounds < _MAX_ROUNDS:
            moved_bytes += await _send_kv(call, await self._on_engine(lambda: giver.copy(giving)))
            await call.write(pb.SessionPart(round_end=pb.RoundEnd()))
            await _expect(call, "ready")
            rounds += 1
            if await self._on_engine(lambda: giver.behind_tokens(giving)) <= _SMALL_TAIL_TOKENS:
                break
        paused_ns = time.monotonic_ns()
        departure = await self._on_engine(lambda: giver.release(giving))
        moved_bytes += await _send_kv(call, departure.chunks)
        await _send(call, peer_wire.state_messages(departure.state))
        committed = (await _expect(call, "committed")).committed
        ended_ns = time.monotonic_ns()
        await call.write(pb.SessionPart(confirm=pb.Confirm()))
        if departure.state.turn is None and await call.read() is not _EOF:
            # Hanging up is all that is left to do, and must not overtake the confirmation.
            raise HandoverError("the other engine did not end the call", status="UNAVAILABLE")
        await self._on_engine(lambda: giver.departed(giving))
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
            # This engine stops, and with it the client's stream.
            live.flush()
            live.sink(_cut_short(live))
            self._engine.call(lambda: giver.ended(giving))
            raise
        finally:
            passing_on.cancel()
            call.cancel()

    # Taking

    async def Take(
        self, request_iterator: Any, context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent]
    ) -> None:
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        taking: Taking | None = None
        taker = self._engine.handovers.taker
        try:
            first = await context.read()
            if first is _EOF or first.WhichOneof("part") != "offer":
                raise HandoverError("the first part must be an offer", status="INVALID_ARGUMENT")
            if first.offer.fingerprint != self._fingerprint:
                raise HandoverError("another model file or llama.cpp build: start both engines with the same")
            offer = peer_wire.offer_from(first.offer)
            taking = Taking(offer, on_stop=lambda: _threadsafe(loop, stopping.set))
            left_s = (first.offer.deadline_ns - time.monotonic_ns()) / 1e9
            async with asyncio.timeout(left_s) as limit:
                await self._take(taking, context, limit, stopping)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the giving engine took too long")
        except HandoverError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
        finally:
            if (taken := taking) is not None:
                self._engine.call(lambda: taker.part(taken))

    async def _take(
        self,
        taking: Taking,
        context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent],
        limit: asyncio.Timeout,
        stopping: asyncio.Event,
    ) -> None:
        await self._on_engine(lambda: self._engine.handovers.accept(taking))
        await context.write(pb.TakenEvent(ready=pb.Ready()))
        state, chunks = await self._receive(taking, context)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[pb.TakenEvent] = asyncio.Queue()

        def put(event: pb.TakenEvent) -> None:
            _threadsafe(loop, lambda: events.put_nowait(event))

        def sink(event: TurnEvent) -> None:
            if isinstance(event, TurnFinished):
                put(peer_wire.done_event(event))

        taker = self._engine.handovers.taker
        await self._on_engine(
            lambda: taker.adopt(taking, state, chunks, sink, lambda sampled: put(peer_wire.sampled_event(sampled)))
        )
        await context.write(pb.TakenEvent(committed=pb.Committed(engine_id=self._engine.engine_id)))
        confirmed = asyncio.Event()
        listening = asyncio.create_task(self._listen(taking, context, limit, confirmed))
        leaving = asyncio.create_task(stopping.wait())
        try:
            await _first_of(listening, leaving, asyncio.create_task(confirmed.wait()))
            while taking.live is not None:
                event = await _first_of(listening, leaving, asyncio.create_task(events.get()))
                await context.write(event)
                if event.WhichOneof("event") == "done":
                    return
        finally:
            listening.cancel()
            leaving.cancel()

    async def _receive(
        self, taking: Taking, context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent]
    ) -> tuple[SessionState, list[KvChunk]]:
        """All that comes until the state has come."""
        taker, form = self._engine.handovers.taker, self._engine.kv_format
        bytes_per_token = self._engine.facts().bytes_per_token
        chunks: list[KvChunk] = []
        while True:
            part = await _next(context)
            if part.WhichOneof("part") == "round_end":
                await context.write(pb.TakenEvent(ready=pb.Ready()))
                continue
            if part.WhichOneof("part") != "blob":
                raise HandoverError("KV, a round's end or the state must come here", status="INVALID_ARGUMENT")
            begin = part.blob
            end_token = begin.first_token + begin.token_count
            await self._on_engine(lambda end_token=end_token: taker.reserve(taking, end_token))  # type: ignore[misc]
            blob = peer_wire.Assembly(begin, bytes_per_token)
            while not blob.complete:
                blob.add((await _next(context)).piece)
            if begin.kind == pb.BLOB_KIND_STATE:
                return blob.state(taking.offer), chunks
            chunks = [*cut_to(chunks, begin.first_token), blob.chunk(form)]

    async def _listen(
        self,
        taking: Taking,
        context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent],
        limit: asyncio.Timeout,
        confirmed: asyncio.Event,
    ) -> None:
        """What the giver says once everything has come. Ends when the giver's end of the stream does."""
        taker = self._engine.handovers.taker
        while (part := await context.read()) is not _EOF:
            if part.WhichOneof("part") == "confirm":
                limit.reschedule(None)
                self._engine.call(lambda: taker.confirm(taking))
                confirmed.set()
            elif part.WhichOneof("part") == "cancel" and taking.live is not None:
                self._engine.cancel(taking.live.turn.id)


def _clear(path: Path) -> None:
    """Remove a socket nobody listens on any more. Raises ListenError where somebody does, or it is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"--peer unix:{path}: {error.strerror}: give another path") from None
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"--peer unix:{path}: exists and is no socket: give another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ListenError(f"--peer unix:{path}: another engine listens there: give another path")


def _threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        pass  # the event loop is closed: the process is going down


def _settle(answer: asyncio.Future[_T], result: _T | None, error: BaseException | None) -> None:
    """Answer a future that may have been answered or given up."""
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)  # type: ignore[arg-type]


async def _next(context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent]) -> pb.SessionPart:
    part = await context.read()
    if part is _EOF:
        raise HandoverError("the giving engine ended its stream too early", status="CANCELLED")
    assert isinstance(part, pb.SessionPart)
    return part


async def _first_of(listening: asyncio.Task[None], leaving: asyncio.Task[bool], wanted: asyncio.Task[_T]) -> _T:
    """The wanted result. Raises HandoverError where the giver hangs up or this engine stops first."""
    try:
        await asyncio.wait({listening, leaving, wanted}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        if leaving.done():
            raise HandoverError("the engine is stopping", status="UNAVAILABLE")
        raise HandoverError("the giving engine has ended its stream", status="CANCELLED")
    finally:
        wanted.cancel()


async def _expect(call: _TakeCall, kind: str) -> pb.TakenEvent:
    event = await call.read()
    if event is _EOF or event.WhichOneof("event") != kind:
        raise HandoverError(f"the other engine did not answer {kind}", status="UNAVAILABLE")
    assert isinstance(event, pb.TakenEvent)
    return event


async def _send(call: _TakeCall, messages: Iterable[pb.SessionPart]) -> None:
    for message in messages:
        await call.write(message)


async def _send_kv(call: _TakeCall, chunks: Iterable[KvChunk]) -> int:
    """Bytes of KV sent."""
    sent = 0
    for chunk in chunks:
        # Joining pieces and reckoning checksums let go of the interpreter now and then only: not on this loop.
        messages = await asyncio.to_thread(lambda chunk=chunk: list(peer_wire.kv_messages(chunk)))  # type: ignore[misc]
        await _send(call, messages)
        sent += messages[0].blob.total_bytes
    return sent


async def _pass_on(cancelled: asyncio.Event, call: _TakeCall) -> None:
    await cancelled.wait()
    try:
        await call.write(pb.SessionPart(cancel=pb.CancelTurn()))
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call has ended; who reads it takes the turn back and ends it


def _cut_short(live: LiveTurn) -> TurnFinished:
    turn = live.turn
    return TurnFinished(
        reason=FinishReason.CANCELLED,
        prompt_tokens=turn.prompt_tokens,
        cached_tokens=turn.cached_tokens,
        recomputed_tokens=turn.recomputed_tokens,
        output_tokens=turn.output_tokens,
        queued_ns=(turn.admitted_ns or turn.arrival_ns) - turn.arrival_ns,
        ttft_ns=None if turn.first_token_ns is None else turn.first_token_ns - turn.arrival_ns,
    )


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
