"""Engines that hand sessions to each other over real sockets, computing with the fake runner: no model is needed."""

from __future__ import annotations

import asyncio
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from equipoise.gpuctl.api.v1 import peer_pb2 as pb
from equipoise.gpuctl.api.v1 import peer_pb2_grpc
from equipoise.gpuctl.engine.compute.runner import BatchSlice, StepResult
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.engine_thread import Deliveries, on_engine
from equipoise.gpuctl.engine.errors import HandoverError, ListenError
from equipoise.gpuctl.engine.openai.http import TurnStream
from equipoise.gpuctl.engine.peer import wire as peer_wire
from equipoise.gpuctl.engine.peer.service import PeerService
from equipoise.gpuctl.engine.peer.session_state import Offer, SessionState
from equipoise.gpuctl.engine.schedule.sequence import (
    FinishReason,
    SamplingParams,
    Session,
    SessionId,
    Slot,
    TenantId,
    TextDelta,
    TokenLogprob,
    Turn,
    TurnFinished,
    TurnId,
    TurnRequest,
)
from equipoise.gpuctl.reports import Reported, TurnEnded
from equipoise.tests.gpuctl.engine.fakes import FakeModel, FakeRunner

PROMPT = "once upon a time there was a fox"
TOKENS = 150
TIMEOUT_S = 20


class PacedRunner(FakeRunner):
    """Takes a moment for each step, so that there is a midst of a turn; gives log probabilities where asked."""

    def step(self, slices: Sequence[BatchSlice]) -> StepResult:
        time.sleep(0.003)
        result = super().step(slices)
        sampled = [
            TokenLogprob(token, -token / 7, ((token, -token / 7), (1, -9.25)))
            if item.logprobs is not None and isinstance(token, int)
            else token
            for item, token in zip(slices, result.sampled, strict=True)
        ]
        return StepResult(result.status, tuple(sampled))


class Peer:
    """An engine with its socket."""

    def __init__(self, path: Path, fingerprint: str, **config: Any) -> None:
        self.address = f"unix:{path}"
        self.path = path
        self.runner = PacedRunner(physical_tokens=4096)
        settings: dict[str, Any] = {"kv_tokens": 2000, "host_bytes": 16 * 4000, **config}
        self.engine = Engine(cast(Any, FakeModel()), self.runner, EngineConfig(**settings))
        self.deliveries = Deliveries(self.engine)
        self.service = PeerService(self.engine, fingerprint)
        self.reports: list[Reported] = []
        self.engine.listen(self.reports.append)

    async def ask(self, session: str = "s", tokens: int = TOKENS, **request: Any) -> Client:
        stream = TurnStream(self.engine, self.deliveries)
        await stream.open(TurnRequest(SessionId(session), TenantId("t"), PROMPT, max_tokens=tokens, **request))
        return Client(stream)

    async def do(self, function: Callable[[], Any]) -> Any:
        return await on_engine(self.engine, function)

    async def holds(self) -> tuple[int, int]:
        """Sessions and tokens, the books having been checked."""

        def count() -> tuple[int, int]:
            ledger = self.engine._ledger
            ledger.check_integrity()
            return len(self.engine._scheduler.sessions), ledger.device_used_tokens + ledger.host_used_tokens

        return cast("tuple[int, int]", await self.do(count))

    async def until_it_holds(self, sessions: int) -> int:
        """Wait for so many sessions; the tokens held then."""
        async with asyncio.timeout(TIMEOUT_S):
            while (held := await self.holds())[0] != sessions:
                await asyncio.sleep(0.01)
        return held[1]

    @property
    def ended(self) -> list[TurnEnded]:
        return [r.report for r in self.reports if isinstance(r.report, TurnEnded)]


class Client:
    """Reads one turn."""

    def __init__(self, stream: TurnStream) -> None:
        self.stream = stream
        self._events = stream.events()
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.end: TurnFinished | None = None

    async def read(self, characters: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.text) < characters and self.end is None:
                event = await anext(self._events)
                if isinstance(event, TextDelta):
                    self.text += event.text
                    self.logprobs += event.logprobs
                else:
                    self.end = event

    async def finish(self) -> TurnFinished:
        await self.read(1 << 30)
        assert self.end is not None
        return self.end


@asynccontextmanager
async def peers(folder: Path, *configs: dict[str, Any], fingerprints: str = "fff") -> AsyncIterator[list[Peer]]:
    async with AsyncExitStack() as stack:
        made = []
        for number, config in enumerate(configs):
            peer = Peer(folder / f"{number}.sock", fingerprints[number], **config)
            peer.engine.start()
            await peer.service.start(peer.address)
            stack.push_async_callback(asyncio.to_thread, peer.engine.stop)
            stack.push_async_callback(peer.service.stop)
            made.append(peer)
        yield made


EXPECTED = FakeRunner().expected_output(PROMPT, TOKENS)


async def test_a_stream_goes_on_through_the_first_engine_while_the_second_computes(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask()
        await client.read(20)
        answer = await a.service.hand_over(SessionId("s"), b.address)
        assert answer.has_turn
        assert answer.engine_id == b.engine.engine_id
        assert answer.round_count >= 1
        assert answer.held_tokens >= len(PROMPT) + 20
        end = await client.finish()
        assert client.text == EXPECTED
        assert end.engine_id == b.engine.engine_id
        assert await a.holds() == (0, 0)
        assert await b.until_it_holds(1) == len(PROMPT) + TOKENS - 1 + answer.held_tokens, "device and host copy"
        assert (len(a.ended), len(b.ended)) == (0, 1)
        assert b.engine.totals.prefill_tokens == 0


async def test_many_turns_are_handed_to_and_fro_and_none_differs(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        clients = {f"s{n}": await a.ask(f"s{n}") for n in range(4)}
        await clients["s0"].read(10)
        await asyncio.gather(*(a.service.hand_over(SessionId(s), b.address) for s in clients))
        for client in clients.values():
            await client.finish()
            assert client.text == EXPECTED
        for session in clients:
            await b.service.hand_over(SessionId(session), a.address)
        assert await b.holds() == (0, 0)
        assert (await a.holds())[0] == 4


async def test_a_session_handed_on_twice_still_reaches_its_client(tmp_path):
    async with peers(tmp_path, {}, {}, {}) as (a, b, c):
        client = await a.ask()
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        await client.read(30)
        await b.service.hand_over(SessionId("s"), c.address)
        end = await client.finish()
        assert client.text == EXPECTED
        assert end.engine_id == c.engine.engine_id
        assert [len(peer.ended) for peer in (a, b, c)] == [0, 0, 1]
        assert await a.holds() == await b.holds() == (0, 0)


async def test_it_does_not_come_back_to_the_engine_its_client_waits_at(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask()
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        with pytest.raises(HandoverError, match="already"):
            await b.service.hand_over(SessionId("s"), a.address)
        await client.finish()
        assert client.text == EXPECTED


async def test_an_idle_session_is_the_takers_once_the_answer_has_come(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        for number in range(10):
            client = await a.ask(f"s{number}", tokens=5)
            await client.finish()
            await a.service.hand_over(SessionId(f"s{number}"), b.address)
            assert (await a.holds(), (await b.holds())[0]) == ((0, 0), number + 1)


async def test_log_probabilities_come_through(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask(sampling=SamplingParams(logprobs=1))
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        await client.finish()
        assert client.text == EXPECTED
        tokens = [ord(character) for character in EXPECTED]
        assert client.logprobs == [TokenLogprob(t, -t / 7, ((t, -t / 7), (1, -9.25))) for t in tokens]


@pytest.mark.parametrize("idle", [True, False])
async def test_a_client_that_goes_away_ends_its_turn_where_it_is(tmp_path, idle):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask(tokens=1500)
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        if idle:
            await client.read(20)
        client.stream.close()
        assert (await client.finish()).reason is FinishReason.CANCELLED
        assert [end.finish_reason for end in b.ended] == [FinishReason.CANCELLED]
        assert await a.holds() == (0, 0)


# Losing the other side


async def test_the_taker_that_goes_away_midway_is_not_noticed_by_the_client(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask(tokens=600)
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        await client.read(40)
        assert b.service._server is not None
        await b.service._server.stop(grace=None)
        end = await client.finish()
        assert client.text == FakeRunner().expected_output(PROMPT, 600)
        assert end.engine_id == a.engine.engine_id
        assert end.output_tokens == 600
        assert (await b.holds())[0] == 1, "it keeps the session it was given"


async def test_a_taker_that_is_stopped_gives_the_turn_back(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask(tokens=600)
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        await client.read(40)
        await asyncio.to_thread(b.engine.stop)
        end = await client.finish()
        assert client.text == FakeRunner().expected_output(PROMPT, 600)
        assert end.engine_id == a.engine.engine_id
        assert (len(a.ended), len(b.ended)) == (1, 0)


async def test_a_giver_that_is_stopped_ends_the_stream_and_the_turn(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask(tokens=1500)
        await client.read(10)
        await a.service.hand_over(SessionId("s"), b.address)
        await client.read(40)
        await asyncio.to_thread(a.engine.stop)
        end = await client.finish()
        assert (end.reason, end.error) == (FinishReason.ERROR, "the engine is stopping"), "not as if it were whole"
        async with asyncio.timeout(TIMEOUT_S):
            while not b.ended:
                await asyncio.sleep(0.01)
        assert b.ended[0].finish_reason is FinishReason.CANCELLED
        assert (await b.holds())[0] == 1


async def test_a_taker_that_does_not_answer_costs_the_deadline_and_nothing_else(tmp_path):
    async with peers(tmp_path, {}) as (a,):
        deaf = Peer(tmp_path / "deaf.sock", "f")  # its engine never reaches a step border
        await deaf.service.start(deaf.address)
        client = await a.ask()
        await client.read(10)
        with pytest.raises(HandoverError, match=r"0\.2 s") as error:
            await a.service.hand_over(SessionId("s"), deaf.address, timeout_ms=200)
        assert error.value.status == "DEADLINE_EXCEEDED"
        await client.finish()
        assert client.text == EXPECTED
        await deaf.service.stop()


# A giver made by hand, to break where it wants


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


# Errors of a hand-over


async def refusal(a: Peer, to: str, **options: Any) -> HandoverError:
    with pytest.raises(HandoverError) as error:
        await a.service.hand_over(SessionId("s"), to, **options)
    return error.value


async def test_what_cannot_be_handed_over_says_why_and_goes_on(tmp_path):
    async with peers(tmp_path, {}, {"host_bytes": 16}, {}, fingerprints="ffg") as (a, small, other):
        unknown = await refusal(a, other.address)
        client = await a.ask(tokens=500)
        await client.read(5)
        link = tmp_path / "alias.sock"
        link.symlink_to(a.path)
        found = {
            "unknown": unknown,
            "self": await refusal(a, f"unix:{link}"),
            "no room": await refusal(a, small.address),
            "other model": await refusal(a, other.address),
            "nobody": await refusal(a, f"unix:{tmp_path}/none.sock"),
            "no address": await refusal(a, "localhost:80"),
            "no time": await refusal(a, other.address, timeout_ms=1 << 40),
        }
        client.stream.close()
        assert (await client.finish()).reason is FinishReason.CANCELLED
        assert client.text == FakeRunner().expected_output(PROMPT, 500)[: len(client.text)]
        assert {name: error.status for name, error in found.items()} == {
            "unknown": "NOT_FOUND",
            "self": "INVALID_ARGUMENT",
            "no room": "RESOURCE_EXHAUSTED",
            "other model": "FAILED_PRECONDITION",
            "nobody": "UNAVAILABLE",
            "no address": "INVALID_ARGUMENT",
            "no time": "INVALID_ARGUMENT",
        }
        assert "--peer" in str(found["nobody"])
        assert all("\n" not in str(error) for error in found.values())
        for peer in (small, other):
            assert await peer.holds() == (0, 0)


async def test_one_hand_over_at_a_time_of_a_session(tmp_path):
    async with peers(tmp_path, {}, {}) as (a, b):
        client = await a.ask()
        await client.read(5)
        results = await asyncio.gather(
            *(a.service.hand_over(SessionId("s"), b.address) for _ in range(3)), return_exceptions=True
        )
        failed = [result for result in results if isinstance(result, HandoverError)]
        assert len(failed) == 2
        assert {error.status for error in failed} == {"ALREADY_EXISTS"}
        await client.finish()
        assert client.text == EXPECTED


# The socket


async def test_the_socket_is_its_users_alone_and_goes_with_the_engine(tmp_path):
    async with peers(tmp_path, {}) as (a,):
        assert stat.S_IMODE(a.path.stat().st_mode) == 0o600
    assert not a.path.exists()


async def test_a_socket_in_use_or_no_socket_is_refused_and_a_dead_one_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    async with peers(tmp_path, {}) as (a,):
        for path, word in ((a.path, "another engine"), (tmp_path / "file", "no socket"), (tmp_path / "x/y", "cannot")):
            with pytest.raises(ListenError, match=word):
                await PeerService(a.engine, "f").start(f"unix:{path}")
        with pytest.raises(ListenError, match="unix:"):
            await PeerService(a.engine, "f").start("127.0.0.1:80")
        assert (tmp_path / "file").read_text() == "mine"
        client = await a.ask()
        await client.finish()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "0.sock"))
    async with peers(tmp_path, {}) as (a,):
        assert (await a.holds())[0] == 0
