"""The daemon's end of the engine hook: reports in as events, engine actions out as directives.

Owns the Attach streams of all engines. It decides nothing and keeps no picture: what an engine reports becomes events,
what the policy wants becomes a directive with an id and a deadline, and its outcome comes back as an event. An engine
that goes away makes every directive still open end as GONE.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from ..policies import actions
from ..policies.actions import Decision, EngineAction, Outcome, OutcomeStatus
from ..policies.events import EngineAttached, EngineDetached, Event, OutcomeObserved
from ..policies.model import DecisionId, Engine, EngineId, Sandbox
from .api.v1 import engine_pb2 as pb
from .api.v1 import engine_pb2_grpc
from .messages import SHARED, engine_of, event_of
from .translation import Enumeration, OneOf, Translation

QUEUE_LENGTH = 1024
"""Directives that may wait for a slow engine; past it they are rejected."""

_STATUSES = Enumeration(
    OutcomeStatus,
    pb.DirectiveStatus,
    unknown=OutcomeStatus.FAILED,
    here=(OutcomeStatus.GONE, OutcomeStatus.FAILED, OutcomeStatus.DRY_RUN),
)
_FINAL = {OutcomeStatus.CLIPPED, OutcomeStatus.REJECTED, OutcomeStatus.COMPLETED, OutcomeStatus.EXPIRED}


Who = Callable[[Engine, str, int, int], Sandbox | None]
"""Whose connection an engine has accepted: engine, the peer's address and port, when. None: nobody's we know."""


@dataclass(slots=True)
class _Stream:
    """One attached engine."""

    engine: Engine
    directives: asyncio.Queue[pb.EngineDirective | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=QUEUE_LENGTH)
    )
    open: dict[DecisionId, int] = field(default_factory=dict)
    """Directives without a final outcome, and when they were sent."""

    @property
    def id(self) -> EngineId:
        return self.engine.id

    @property
    def kind(self) -> str:
        return self.engine.kind


class EngineHook(engine_pb2_grpc.EngineServiceServicer):
    """The EngineService servicer. `emit` takes events in the order they came; `now_ns` is CLOCK_MONOTONIC."""

    def __init__(self, emit: Callable[[Event], None], now_ns: Callable[[], int], who: Who = lambda *peer: None) -> None:
        self._emit = emit
        self._now_ns = now_ns
        self._who = who
        self._streams: dict[EngineId, _Stream] = {}

    @property
    def attached(self) -> tuple[EngineId, ...]:
        return tuple(self._streams)

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.EngineReport],
        context: grpc.aio.ServicerContext[pb.EngineReport, pb.EngineDirective],
    ) -> AsyncIterator[pb.EngineDirective]:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("report") != "hello" or not first.hello.engine_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first report must be a Hello with an engine_id")
        engine = engine_of(first.hello)
        stream = _Stream(engine)
        if replaced := self._streams.get(engine.id):
            self._close(replaced)
        self._streams[engine.id] = stream
        self._emit(EngineAttached(first.at_ns or self._now_ns(), engine))
        reading = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while (directive := await stream.directives.get()) is not None:
                yield directive
        finally:
            reading.cancel()
            if self._streams.get(stream.id) is stream:
                self._close(stream)
                self._emit(EngineDetached(self._now_ns(), stream.id))

    async def _read(self, stream: _Stream, reports: AsyncIterator[pb.EngineReport]) -> None:
        try:
            async for report in reports:
                if report.WhichOneof("report") == "directive_outcome":
                    self._outcome(stream, report)
                elif report.WhichOneof("report") == "peer_seen":
                    self._peer_seen(stream, report)
                elif (event := event_of(report, stream.id)) is not None:
                    self._emit(event)
        except grpc.aio.AioRpcError:
            pass  # the engine went away; the stream's end below says so
        finally:
            await stream.directives.put(None)

    def _peer_seen(self, stream: _Stream, report: pb.EngineReport) -> None:
        seen = report.peer_seen
        sandbox = self._who(stream.engine, seen.peer_address, seen.peer_port, report.at_ns or self._now_ns())
        answer = pb.PeerIs(peer_address=seen.peer_address, peer_port=seen.peer_port)
        if sandbox is not None:
            answer.tenant_id, answer.sandbox, answer.session_id = sandbox.tenant, sandbox.label, sandbox.session
        try:
            stream.directives.put_nowait(pb.EngineDirective(peer_is=answer))
        except asyncio.QueueFull:
            pass  # the engine does not wait for long

    def _outcome(self, stream: _Stream, report: pb.EngineReport) -> None:
        told = report.directive_outcome
        status = _STATUSES.decode(told.status)
        decision = DecisionId(told.directive_id)
        sent_ns = stream.open.get(decision)
        if sent_ns is None:
            return  # answered twice, or about a directive from before a restart of ours
        if status in _FINAL:
            del stream.open[decision]
        at_ns = report.at_ns or self._now_ns()
        self._emit(
            OutcomeObserved(
                at_ns,
                Outcome(decision, status, at_ns, f"engine {stream.kind}", told.reason, max(0, at_ns - sent_ns)),
            )
        )

    def _close(self, stream: _Stream) -> None:
        """End a stream; everything still open on it is gone."""
        self._streams.pop(stream.id, None)
        at_ns = self._now_ns()
        for decision in stream.open:
            self._emit(
                OutcomeObserved(
                    at_ns, Outcome(decision, OutcomeStatus.GONE, at_ns, f"engine {stream.kind}", "the engine went away")
                )
            )
        stream.open.clear()
        while not stream.directives.empty():
            stream.directives.get_nowait()
        stream.directives.put_nowait(None)

    def send(self, decision: Decision, action: EngineAction) -> Outcome | None:
        """Ask an engine. None: sent, outcomes will come as events; else the outcome that it has already."""
        now_ns = self._now_ns()
        stream = self._streams.get(action.engine)
        if stream is None:
            return Outcome(decision.id, OutcomeStatus.GONE, now_ns, "engine", f"engine {action.engine} is not attached")
        try:
            stream.directives.put_nowait(directive_of(decision, action))
        except asyncio.QueueFull:
            detail = f"{QUEUE_LENGTH} directives wait for the engine"
            return Outcome(decision.id, OutcomeStatus.REJECTED, now_ns, f"engine {stream.kind}", detail)
        stream.open[decision.id] = now_ns
        return None


def _asks(action: type[EngineAction], message: type[Message], *renamed: str) -> Translation[Any, Any]:
    names = {each: f"{each}_id" for each in renamed}
    return Translation(action, message, renamed=names, here=("engine", "expires_ns"), using=SHARED)


_DIRECTIVES: OneOf[EngineAction, pb.EngineDirective] = OneOf(
    pb.EngineDirective,
    "directive",
    (
        _asks(actions.SwapOut, pb.SwapOut, "session"),
        _asks(actions.SwapIn, pb.SwapIn, "session"),
        _asks(actions.Retain, pb.Retain, "session"),
        _asks(actions.Drop, pb.Drop, "session"),
        _asks(actions.Hold, pb.Hold, "session"),
        _asks(actions.Release, pb.Release, "session"),
        _asks(actions.SetTenantWeight, pb.SetTenantWeight, "tenant"),
        _asks(actions.SetHostTierCapacity, pb.SetHostTierCapacity),
    ),
    there=("preempt", "set_capacity", "peer_is"),
)
"""What no action stands for, nobody has asked yet; and PeerIs is an answer."""


def directive_of(decision: Decision, action: EngineAction) -> pb.EngineDirective:
    """The directive that asks for an action, under the decision's id."""
    return _DIRECTIVES.encode(action, directive_id=decision.id, deadline_ns=action.expires_ns)
