"""The engine's end of the hook against a real gRPC server on a real socket: there, late, gone and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import httpx
import pytest
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.energy import EnergyMeter, open_meter
from equipoise.tests.gpuctl.engine.attaching import serving
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = pytest.mark.engine
ASK = {"messages": [{"role": "user", "content": "Tell me of a fox."}], "max_tokens": 8, "temperature": 0}


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
            cost = ended.cost
            assert cost.pte >= ended.prompt_tokens and cost.wasted_pte == 0
            assert cost.duration_ns > ended.ttft_ns and cost.ideal_ns > 0
            measurable = isinstance(open_meter(on_gpu=False), EnergyMeter)
            assert cost.HasField("energy_joules") == measurable, "absent where nothing measures it, and never 0"
            started = daemon.of("turn_started")[0]
            assert started.peer_port > 0 and started.peer_address == "127.0.0.1"
            assert list(hello.listen_addresses) == [engine.url.removeprefix("http://")]
            [seen] = daemon.of("peer_seen")
            assert (seen.peer_address, seen.peer_port) == ("127.0.0.1", started.peer_port)

            out = await daemon.ask("1", swap_out=pb.SwapOut(session_id="a", tier=pb.KV_TIER_HOST))
            assert out.status == pb.DIRECTIVE_STATUS_COMPLETED
            (move,) = daemon.of("session_moved")
            assert (move.from_tier, move.to_tier, move.directive_id) == (pb.KV_TIER_DEVICE, pb.KV_TIER_HOST, "1")
            assert move.moved_bytes == pytest.approx(move.tokens * hello.bytes_per_token, rel=0.01)
            await daemon.until(lambda: daemon.kv("a").tier == pb.KV_TIER_HOST)

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
            await daemon.until(lambda: daemon.kv("a").phase == pb.SESSION_PHASE_HELD)
            await asyncio.sleep(0.5)
            assert not held.done()
        assert (await asyncio.wait_for(held, 20)).status_code == 200
        async with serving(path) as second:
            await second.until(lambda: bool(second.of("occupancy")))
            assert second.of("hello")[0].engine_id == first_id
            assert [s.session_id for s in second.of("occupancy")[0].sessions] == ["a"]
