"""Every directive with every outcome it can have, from a real gRPC server to a real engine process and back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.tests.gpuctl.engine.attaching import Daemon, serving
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

HOUR_NS = 3600 * 10**9
ACCEPTED, CLIPPED, DEFERRED, REJECTED, COMPLETED, EXPIRED = (
    pb.DirectiveStatus.Value(f"DIRECTIVE_STATUS_{name}")
    for name in ("ACCEPTED", "CLIPPED", "DEFERRED", "REJECTED", "COMPLETED", "EXPIRED")
)
NUMBERS = itertools.count()
RUNNING_TOKENS = 80

IDLE, SWAPPED, DROPPED, RUNNING, UNKNOWN = "idle", "swapped", "dropped", "running", "unknown"


@dataclass
class Pair:
    """An engine attached to a daemon."""

    engine: EngineProcess
    daemon: Daemon


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(model: object, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    path = tmp_path_factory.mktemp("hook") / "s"
    options = ("--kv-tokens", "1024", "--slots", "4", "--host-bytes", "64MiB", "--share-prefix-tokens", "0")
    async with serving(str(path)) as daemon:
        with running("--attach", f"unix:{path}", *options) as engine:
            await daemon.until(lambda: bool(daemon.of("hello")))
            yield Pair(engine, daemon)


@asynccontextmanager
async def prepared(pair: Pair, state: str) -> AsyncIterator[str]:
    """A session that is in that state; afterwards the engine is as it was."""
    daemon, session = pair.daemon, f"session-{next(NUMBERS)}"
    if state == RUNNING:
        turn = asyncio.create_task(ask(pair.engine, session, RUNNING_TOKENS))
        await daemon.until(lambda: any(started.session_id == session for started in daemon.of("turn_started")))
    elif state != UNKNOWN:
        await ask(pair.engine, session, 8)
    if state == SWAPPED:
        await daemon.ask(f"{session} out", swap_out=pb.SwapOut(session_id=session, tier=pb.KV_TIER_HOST))
    if state == DROPPED:
        await daemon.ask(f"{session} drop", drop=pb.Drop(session_id=session))
    yield session
    if state == RUNNING:
        answer = await turn
        assert answer.json()["usage"]["completion_tokens"] == RUNNING_TOKENS
    if state != UNKNOWN:
        await daemon.ask(f"{session} release", release=pb.Release(session_id=session))
        await daemon.ask(f"{session} unpin", retain=pb.Retain(session_id=session, ttl_ns=0))
        await daemon.ask(f"{session} away", drop=pb.Drop(session_id=session))
    await daemon.ask(f"{session} capacity", set_capacity=pb.SetCapacity(device_tokens=1024))
    await daemon.ask(f"{session} host", set_host_tier_capacity=pb.SetHostTierCapacity(host_bytes=64 << 20))


async def ask(engine: EngineProcess, session: str, tokens: int) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Tell me of a fox."}], "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(
            f"{engine.url}/v1/chat/completions", json=body, headers={"X-Equipoise-Session": session}
        )
    assert answer.status_code == 200
    return answer


# (directive, its fields, the session's state, the outcomes in order, a word of the last one's reason)
CASES: list[tuple[str, dict[str, Any], str, list[int], str]] = [
    ("set_tenant_weight", {"tenant_id": "gold", "weight": 2.5}, UNKNOWN, [COMPLETED], ""),
    ("set_tenant_weight", {"tenant_id": "gold", "weight": 0.0}, UNKNOWN, [REJECTED], "1000"),
    ("set_tenant_weight", {"tenant_id": "gold", "weight": float("nan")}, UNKNOWN, [REJECTED], "1000"),
    ("hold", {"ttl_ns": 10**9}, IDLE, [COMPLETED], ""),
    ("hold", {"ttl_ns": 2 * HOUR_NS}, IDLE, [CLIPPED], "1 h"),
    ("hold", {"ttl_ns": 10**9}, UNKNOWN, [REJECTED], "no session"),
    ("release", {}, IDLE, [COMPLETED], ""),
    ("release", {}, UNKNOWN, [REJECTED], "no session"),
    ("preempt", {"mode": pb.PREEMPT_MODE_RECOMPUTE}, RUNNING, [ACCEPTED, COMPLETED], ""),
    ("preempt", {"mode": pb.PREEMPT_MODE_SWAP}, RUNNING, [ACCEPTED, COMPLETED], ""),
    ("preempt", {"mode": pb.PREEMPT_MODE_SWAP}, IDLE, [REJECTED], "no turn"),
    ("preempt", {"mode": pb.PREEMPT_MODE_SWAP}, UNKNOWN, [REJECTED], "no session"),
    ("swap_out", {"tier": pb.KV_TIER_HOST}, IDLE, [ACCEPTED, COMPLETED], ""),
    ("swap_out", {"tier": pb.KV_TIER_HOST}, SWAPPED, [COMPLETED], "host"),
    ("swap_out", {"tier": pb.KV_TIER_HOST}, RUNNING, [DEFERRED, ACCEPTED, COMPLETED], ""),
    ("swap_out", {"tier": pb.KV_TIER_DISK}, IDLE, [REJECTED], "disk"),
    ("swap_out", {"tier": pb.KV_TIER_DEVICE}, IDLE, [REJECTED], "host or disk"),
    ("swap_out", {"tier": pb.KV_TIER_HOST}, UNKNOWN, [REJECTED], "no session"),
    ("swap_in", {}, SWAPPED, [ACCEPTED, COMPLETED], ""),
    ("swap_in", {}, IDLE, [COMPLETED], "already"),
    ("swap_in", {}, DROPPED, [REJECTED], "nothing is held"),
    ("swap_in", {}, UNKNOWN, [REJECTED], "no session"),
    ("retain", {"ttl_ns": 10**9}, IDLE, [COMPLETED], ""),
    ("retain", {"ttl_ns": 2 * HOUR_NS}, IDLE, [CLIPPED], "1 h"),
    ("retain", {"ttl_ns": 10**9}, SWAPPED, [CLIPPED], "not on the device"),
    ("retain", {"ttl_ns": 10**9}, UNKNOWN, [REJECTED], "no session"),
    ("drop", {}, IDLE, [COMPLETED], ""),
    ("drop", {"from_token": 5}, IDLE, [COMPLETED], ""),
    ("drop", {"from_token": 5000}, IDLE, [COMPLETED], "only"),
    ("drop", {"from_token": -1}, IDLE, [REJECTED], "-1"),
    ("drop", {}, RUNNING, [REJECTED], "preempt"),
    ("drop", {}, UNKNOWN, [REJECTED], "no session"),
    ("set_capacity", {"device_tokens": 800}, IDLE, [COMPLETED], ""),
    ("set_capacity", {"device_tokens": 10**9}, IDLE, [CLIPPED], "1024"),
    ("set_capacity", {"device_tokens": -5}, IDLE, [CLIPPED], "set to 1"),
    ("set_host_tier_capacity", {"host_bytes": 0}, SWAPPED, [COMPLETED], ""),
    ("set_host_tier_capacity", {"host_bytes": -1}, IDLE, [REJECTED], "-1"),
]
MESSAGES: dict[str, Any] = {
    "set_tenant_weight": pb.SetTenantWeight,
    "hold": pb.Hold,
    "release": pb.Release,
    "preempt": pb.Preempt,
    "swap_out": pb.SwapOut,
    "swap_in": pb.SwapIn,
    "retain": pb.Retain,
    "drop": pb.Drop,
    "set_capacity": pb.SetCapacity,
    "set_host_tier_capacity": pb.SetHostTierCapacity,
}


def directive(kind: str, fields: dict[str, Any], session: str) -> dict[str, Any]:
    message = MESSAGES[kind]
    if "session_id" in message.DESCRIPTOR.fields_by_name:
        fields = {**fields, "session_id": session}
    return {kind: message(**fields)}


async def test_every_directive_of_the_protocol_is_in_the_table():
    answers = {"peer_is"}  # to what the engine asked: it asks for nothing, and has no outcome
    known = {field.name for field in pb.EngineDirective.DESCRIPTOR.oneofs[0].fields} - answers
    assert {case[0] for case in CASES} == set(MESSAGES) == known


@pytest.mark.parametrize(("kind", "fields", "state", "statuses", "word"), CASES)
async def test_a_directive_has_its_outcomes_and_its_repetition_the_same_last_one(
    pair, kind, fields, state, statuses, word
):
    daemon = pair.daemon
    async with prepared(pair, state) as session:
        name, asked = f"{session} {kind}", directive(kind, fields, session)
        last = await daemon.ask(name, **asked)
        assert [outcome.status for outcome in daemon.outcomes(name)] == statuses
        assert word in last.reason
        await daemon.send(name, **asked)
        await daemon.until(lambda: len(daemon.outcomes(name)) > len(statuses))
        assert daemon.outcomes(name)[-1] == last
        assert len(daemon.moves(name)) <= 1


@pytest.mark.parametrize("kind", sorted(MESSAGES))
async def test_past_its_deadline_no_directive_is_applied(pair, kind):
    daemon = pair.daemon
    async with prepared(pair, IDLE) as session:
        name = f"{session} late {kind}"
        late = await daemon.ask(name, deadline_s=-1, **directive(kind, {}, session))
        assert late.status == EXPIRED
        assert not daemon.moves(name)
        assert daemon.of("occupancy")[-1].device_capacity_tokens == 1024
        assert daemon.of("occupancy")[-1].host_capacity_bytes == 64 << 20


async def test_a_prefetch_without_room_is_deferred_until_it_expires(pair):
    daemon = pair.daemon
    async with prepared(pair, SWAPPED) as session:
        await daemon.ask(f"{session} little", set_capacity=pb.SetCapacity(device_tokens=30))
        late = await daemon.ask(f"{session} in", deadline_s=0.5, **directive("swap_in", {}, session))
        assert late.status == EXPIRED
        assert [outcome.status for outcome in daemon.outcomes(f"{session} in")] == [DEFERRED, EXPIRED]


async def test_a_directive_of_no_known_kind_is_rejected(pair):
    assert (await pair.daemon.ask("what")).status == REJECTED
