"""A giver made by hand, to break where it wants: what it leaves with an engine that takes from it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.api.v1 import peer_pb2_grpc
from equipoise.gpuctl.engine.peer import wire as peer_wire
from equipoise.gpuctl.engine.peer.session_state import Offer, SessionState
from equipoise.gpuctl.engine.schedule.sequence import (
    FinishReason,
    Session,
    SessionId,
    Slot,
    TenantId,
    Turn,
    TurnId,
    TurnRequest,
)
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from equipoise.tests.gpuctl.engine.peer.peers import (
    PROMPT,
    TIMEOUT_S,
    Peer,
    peers,
)


class HandGiver:
    """Sends parts one by one."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.call: Any = peer_pb2_grpc.EnginePeerServiceStub(self._channel).Take()

    async def offer(self, peer: Peer, *, life_s: float = 20, **changes: Any) -> None:
        held = len(PROMPT) + 3
        offer = Offer(SessionId("s"), TenantId("t"), "giver", held + 1, held, peer.runner.kv_format)
        message = peer_wire.offer_message(offer, "f", time.monotonic_ns() + int(life_s * 1e9))
        for name, value in changes.items():
            setattr(message.offer, name, value)
        await self.call.write(message)

    async def send_kv(self) -> list[int]:
        """KV of a turn with four outputs; its tokens."""
        runner = FakeRunner()
        whole = [ord(character) for character in PROMPT + runner.expected_output(PROMPT, 4)]
        runner.slots[0] = whole[:-1]
        for message in peer_wire.kv_messages(runner.copy(Slot(0), 0)):
            await self.call.write(message)
        return whole

    async def send_all(self) -> None:
        """The KV of a turn of 1,500 tokens, and its state."""
        whole, tokens = await self.send_kv(), 1500
        turn = Turn(TurnId("x"), SessionId("s"), TenantId("t"), 1, len(PROMPT), tokens, output_tokens=4, admitted_ns=2)
        session = Session(SessionId("s"), TenantId("t"), tokens=whole, computed_high_tokens=len(whole) - 1)
        request = TurnRequest(SessionId("s"), TenantId("t"), PROMPT, max_tokens=tokens)
        for message in peer_wire.state_messages(SessionState(session, len(whole) - 1, turn, request)):
            await self.call.write(message)

    async def until(self, kind: str) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while (await self.call.read()).WhichOneof("event") != kind:
                pass

    async def refusal(self) -> tuple[str, str]:
        async with asyncio.timeout(TIMEOUT_S):
            return (await self.call.code()).name, await self.call.details()

    async def die(self) -> None:
        await self._channel.close(grace=None)


async def test_a_giver_that_dies_before_it_confirms_leaves_nothing_behind(tmp_path):
    async with peers(tmp_path, {}) as (b,):
        for stage in ("offer", "kv", "state"):
            giver = HandGiver(b.address)
            await giver.offer(b)
            await giver.until("ready")
            if stage != "offer":
                assert (await b.holds())[1] > 0, "room is set aside"
            if stage == "state":
                await giver.send_all()
                await giver.until("committed")
            if stage == "kv":
                await giver.send_kv()
                await giver.call.write(pb.SessionPart(round_end=pb.RoundEnd()))
                await giver.until("ready")
            await giver.die()
            async with asyncio.timeout(TIMEOUT_S):
                while await b.holds() != (0, 0):
                    await asyncio.sleep(0.01)
        assert not b.ended


async def test_a_giver_that_dies_after_it_confirmed_leaves_the_session_and_a_cancelled_turn(tmp_path):
    async with peers(tmp_path, {}) as (b,):
        giver = HandGiver(b.address)
        await giver.offer(b)
        await giver.until("ready")
        await giver.send_all()
        await giver.until("committed")
        await giver.call.write(pb.SessionPart(confirm=pb.Confirm()))
        await giver.until("sampled")
        await giver.die()
        async with asyncio.timeout(TIMEOUT_S):
            while not b.ended:
                await asyncio.sleep(0.01)
        assert b.ended[0].finish_reason is FinishReason.CANCELLED
        assert await b.until_it_holds(1) > len(PROMPT)
        assert all(sampler.closed for sampler in b.runner.samplers)


async def test_a_giver_that_never_confirms_is_given_up_at_its_deadline(tmp_path):
    async with peers(tmp_path, {}) as (b,):
        giver = HandGiver(b.address)
        await giver.offer(b, life_s=0.4)
        await giver.until("ready")
        await giver.send_all()
        await giver.until("committed")
        assert (await giver.refusal())[0] == "DEADLINE_EXCEEDED"
        assert await b.until_it_holds(0) == 0


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda part: setattr(part.piece, "crc32", 1), "DATA_LOSS"),
        (lambda part: setattr(part.piece, "data", part.piece.data * 2), "DATA_LOSS"),
        (lambda part: part.confirm.SetInParent(), "DATA_LOSS"),
    ],
    ids=["checksum", "too much", "no piece"],
)
async def test_kv_that_came_corrupt_is_refused_and_takes_no_room(tmp_path, spoil, status):
    async with peers(tmp_path, {}) as (b,):
        giver = HandGiver(b.address)
        await giver.offer(b)
        await giver.until("ready")
        runner = FakeRunner()
        runner.slots[0] = [1, 2, 3]
        begin, piece = peer_wire.kv_messages(runner.copy(Slot(0), 0))
        spoil(piece)
        await giver.call.write(begin)
        await giver.call.write(piece)
        assert (await giver.refusal())[0] == status
        assert await b.until_it_holds(0) == 0


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"fingerprint": "other"}, "FAILED_PRECONDITION", "model"),
        ({"session_id": ""}, "INVALID_ARGUMENT", "name a session"),
        ({"held_tokens": 1_000_000, "context_tokens": 10}, "RESOURCE_EXHAUSTED", "--host-bytes"),
        ({"context_tokens": 1_000_000}, "RESOURCE_EXHAUSTED", "1000000 tokens"),
    ],
)
async def test_a_bad_offer_is_refused_by_its_reason(tmp_path, changes, status, word):
    async with peers(tmp_path, {}) as (b,):
        giver = HandGiver(b.address)
        await giver.offer(b, **changes)
        code, details = await giver.refusal()
        assert code == status
        assert word in details
        assert await b.holds() == (0, 0)
