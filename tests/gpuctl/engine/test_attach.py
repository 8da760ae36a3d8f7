"""The engine's end of the hook against a real gRPC server on a real socket: there, late, gone and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import httpx
import pytest
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.api.v1 import engine_pb2_grpc
from equipoise.gpuctl.energy import EnergyMeter, open_meter
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = pytest.mark.engine
ASK = {"messages": [{"role": "user", "content": "Tell me of a fox."}], "max_tokens": 8, "temperature": 0}


class Daemon(engine_pb2_grpc.EngineServiceServicer):
    """The daemon's end, as small as it can be."""

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

    async def until(self, met: Callable[[], bool], timeout_s: float = 30) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(met), timeout_s)

    async def ask(self, name: str, **directive: Any) -> pb.DirectiveOutcome:
        """Send a directive and wait for its final outcome."""
        deadline_ns = time.monotonic_ns() + 10**10
        await self._directives.put(pb.EngineDirective(directive_id=name, deadline_ns=deadline_ns, **directive))
        unfinished = (pb.DIRECTIVE_STATUS_ACCEPTED, pb.DIRECTIVE_STATUS_DEFERRED)

        def final() -> list[Any]:
            outcomes = self.of("directive_outcome")
            return [o for o in outcomes if o.directive_id == name and o.status not in unfinished]

        await self.until(lambda: bool(final()))
        outcome: pb.DirectiveOutcome = final()[-1]
        return outcome


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


def turn(engine: EngineProcess, session: str, **more: Any) -> Awaitable[httpx.Response]:
    return asyncio.to_thread(
        httpx.post,
        f"{engine.url}/v1/chat/completions",
        json={**ASK, **more},
        headers={"X-Equipoise-Session": session, "X-Equipoise-Tenant": "blue", "X-Equipoise-Awaits-Tool": "1"},
        timeout=60,
    )


async def test_the_engine_reports_turns_and_obeys_directives(tmp_path):
    path = f"{tmp_path}/equipoise.sock"
    async with serving(path) as daemon:
        with running("--attach", f"unix:{path}", "--kv-tokens", "1024", "--slots", "4") as engine:
            await daemon.until(lambda: bool(daemon.of("hello")))
            (hello,) = daemon.of("hello")
            assert daemon.reports[0].WhichOneof("report") == "hello"
            assert (hello.device_capacity_tokens, hello.pid) == (1024, engine.process.pid)
            assert hello.bytes_per_token > 20_000
            assert "swap_out" in hello.supported_directives

            assert (await turn(engine, "a")).status_code == 200
            await daemon.until(lambda: bool(daemon.of("turn_ended")))
            (ended,) = daemon.of("turn_ended")
            assert (ended.session_id, ended.tenant_id) == ("a", "blue")
            assert ended.finish_reason == pb.FINISH_REASON_TOOL_CALLS
            assert ended.ttft_ns > 0
            assert ended.pte >= ended.prompt_tokens and ended.wasted_pte == 0
            assert ended.duration_ns > ended.ttft_ns and ended.ideal_ns > 0
            measurable = isinstance(open_meter(on_gpu=False), EnergyMeter)
            assert ended.HasField("energy_joules") == measurable, "absent where nothing measures it, and never 0"
            assert daemon.of("turn_started")[0].peer_port > 0

            out = await daemon.ask("1", swap_out=pb.SwapOut(session_id="a", tier=pb.KV_TIER_HOST))
            assert out.status == pb.DIRECTIVE_STATUS_COMPLETED
            (move,) = daemon.of("session_moved")
            assert (move.from_tier, move.to_tier, move.directive_id) == (pb.KV_TIER_DEVICE, pb.KV_TIER_HOST, "1")
            assert move.moved_bytes == pytest.approx(move.tokens * hello.bytes_per_token, rel=0.01)
            await daemon.until(lambda: daemon.of("occupancy")[-1].sessions[0].tier == pb.KV_TIER_HOST)

            again = await daemon.ask("1", swap_out=pb.SwapOut(session_id="a", tier=pb.KV_TIER_HOST))
            assert again.status == pb.DIRECTIVE_STATUS_COMPLETED
            back = await daemon.ask("2", swap_in=pb.SwapIn(session_id="a"))
            assert back.status == pb.DIRECTIVE_STATUS_COMPLETED
            assert len(daemon.of("session_moved")) == 2
            nobody = await daemon.ask("3", swap_in=pb.SwapIn(session_id="nobody"))
            assert (nobody.status, nobody.reason) == (pb.DIRECTIVE_STATUS_REJECTED, "no session nobody")
            unknown = await daemon.ask("4")
            assert unknown.status == pb.DIRECTIVE_STATUS_REJECTED


async def test_without_a_daemon_the_engine_serves_and_attaches_when_one_comes(tmp_path):
    path = f"{tmp_path}/equipoise.sock"
    with running("--attach", f"unix:{path}", "--kv-tokens", "512", "--slots", "2") as engine:
        assert (await turn(engine, "early")).status_code == 200
        async with serving(path) as daemon:
            await daemon.until(lambda: bool(daemon.of("occupancy")))
            assert daemon.of("occupancy")[0].sessions[0].session_id == "early"


async def test_when_the_daemon_goes_its_holds_end_and_the_engine_comes_back_to_the_next(tmp_path):
    path = f"{tmp_path}/equipoise.sock"
    with running("--attach", f"unix:{path}", "--kv-tokens", "512", "--slots", "2") as engine:
        async with serving(path) as daemon:
            await daemon.until(lambda: bool(daemon.of("hello")))
            first_id = daemon.of("hello")[0].engine_id
            assert (await turn(engine, "a")).status_code == 200
            hold = await daemon.ask("h", hold=pb.Hold(session_id="a", ttl_ns=3600 * 10**9))
            assert hold.status == pb.DIRECTIVE_STATUS_COMPLETED
            held = asyncio.ensure_future(turn(engine, "a"))
            await daemon.until(lambda: daemon.of("occupancy")[-1].sessions[0].phase == pb.SESSION_PHASE_HELD)
            await asyncio.sleep(0.5)
            assert not held.done()
        assert (await asyncio.wait_for(held, 20)).status_code == 200
        async with serving(path) as second:
            await second.until(lambda: bool(second.of("occupancy")))
            assert second.of("hello")[0].engine_id == first_id
            assert [s.session_id for s in second.of("occupancy")[0].sessions] == ["a"]
