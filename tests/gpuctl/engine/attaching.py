"""The daemon's end of the hook, as small as it can be, on a real gRPC server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.api.v1 import engine_pb2_grpc

UNFINISHED = (pb.DIRECTIVE_STATUS_ACCEPTED, pb.DIRECTIVE_STATUS_DEFERRED)


class Daemon(engine_pb2_grpc.EngineServiceServicer):
    def __init__(self) -> None:
        self.reports: list[pb.EngineReport] = []
        self._changed = asyncio.Condition()
        self._directives: asyncio.Queue[pb.EngineDirective] = asyncio.Queue()

    async def Attach(
        self, request_iterator: AsyncIterator[pb.EngineReport], context: Any
    ) -> AsyncIterator[pb.EngineDirective]:
        reading = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                yield await self._directives.get()
        finally:
            reading.cancel()

    async def _read(self, reports: AsyncIterator[pb.EngineReport]) -> None:
        async for report in reports:
            async with self._changed:
                self.reports.append(report)
                self._changed.notify_all()

    def of(self, kind: str) -> list[Any]:
        return [getattr(report, kind) for report in self.reports if report.WhichOneof("report") == kind]

    def kv(self, session: str) -> pb.SessionKv:
        """What the last occupancy says of the session; empty where there is none or it names none."""
        rows = [row for occupancy in self.of("occupancy")[-1:] for row in occupancy.sessions]
        return next((row for row in rows if row.session_id == session), pb.SessionKv())

    async def until(self, met: Callable[[], bool], timeout_s: float = 30) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(met), timeout_s)

    def outcomes(self, name: str) -> list[pb.DirectiveOutcome]:
        return [outcome for outcome in self.of("directive_outcome") if outcome.directive_id == name]

    def moves(self, name: str) -> list[pb.SessionMoved]:
        return [moved for moved in self.of("session_moved") if moved.directive_id == name]

    async def send(self, name: str, deadline_s: float = 30.0, **directive: Any) -> None:
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        await self._directives.put(pb.EngineDirective(directive_id=name, deadline_ns=deadline_ns, **directive))

    async def ask(self, name: str, deadline_s: float = 30.0, **directive: Any) -> pb.DirectiveOutcome:
        """Send a directive and wait for its final outcome."""
        await self.send(name, deadline_s, **directive)
        await self.until(lambda: any(outcome.status not in UNFINISHED for outcome in self.outcomes(name)))
        return self.outcomes(name)[-1]


@asynccontextmanager
async def serving(path: str) -> AsyncIterator[Daemon]:
    server = grpc.aio.server()
    daemon = Daemon()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(daemon, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield daemon
    finally:
        await server.stop(0)
