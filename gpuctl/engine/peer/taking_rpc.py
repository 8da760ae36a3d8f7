"""The taking side's call: receives a session from another engine and sends back the tokens of its turn.

Owns: the order of what comes, and the deadline until it is confirmed. Must not: touch the engine's state except on its
thread, through taking.py. However the call ends, `part` is handed to the engine's thread after everything else of it.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from ...api.v1 import peer_pb2 as pb
from ..compute.kv_image import KvChunk, cut_to
from ..engine import Engine
from ..engine_thread import on_engine, threadsafe
from ..errors import STOPPING, ConstraintError, HandoverError
from ..schedule.sequence import TurnEvent, TurnFinished
from . import wire as peer_wire
from .session_state import SessionState
from .taking import Taking

_T = TypeVar("_T")
_Context = Any  # grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent], which is generic in stubs only
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs


class PeerTaker:
    """Takes sessions into one engine; one `take` each."""

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        self._engine = engine
        self._fingerprint = fingerprint

    async def take(self, context: _Context) -> None:
        """Serve one call to its end. Aborts it where the session cannot be had."""
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
            taking = Taking(offer, on_stop=lambda: threadsafe(loop, stopping.set))
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
        context: _Context,
        limit: asyncio.Timeout,
        stopping: asyncio.Event,
    ) -> None:
        await on_engine(self._engine, lambda: self._engine.handovers.accept(taking))
        await context.write(pb.TakenEvent(ready=pb.Ready()))
        state, chunks = await self._receive(taking, context)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[pb.TakenEvent] = asyncio.Queue()

        def put(event: pb.TakenEvent) -> None:
            threadsafe(loop, lambda: events.put_nowait(event))

        def sink(event: TurnEvent) -> None:
            if isinstance(event, TurnFinished):
                put(peer_wire.done_event(event))

        taker = self._engine.handovers.taker
        await on_engine(
            self._engine,
            lambda: taker.adopt(taking, state, chunks, sink, lambda sampled: put(peer_wire.sampled_event(sampled))),
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

    async def _receive(self, taking: Taking, context: _Context) -> tuple[SessionState, list[KvChunk]]:
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
            await on_engine(self._engine, partial(taker.reserve, taking, end_token))
            blob = peer_wire.Assembly(begin, bytes_per_token)
            while not blob.complete:
                blob.add((await _next(context)).piece)
            if begin.kind == pb.BLOB_KIND_STATE:
                try:
                    state = await asyncio.to_thread(blob.state, taking.offer, self._engine.model.constraint)
                except ConstraintError as error:
                    raise HandoverError(f"session {taking.offer.session_id}: {error}") from None
                return state, chunks
            chunks = [*cut_to(chunks, begin.first_token), blob.chunk(form)]

    async def _listen(
        self,
        taking: Taking,
        context: _Context,
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


async def _next(context: _Context) -> pb.SessionPart:
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
            raise HandoverError(STOPPING, status="UNAVAILABLE")
        raise HandoverError("the giving engine has ended its stream", status="CANCELLED")
    finally:
        wanted.cancel()
