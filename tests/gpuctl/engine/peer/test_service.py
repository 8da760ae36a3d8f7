"""Engines that hand sessions to each other over real sockets, computing with the fake runner: no model is needed."""

from __future__ import annotations

import asyncio
import socket
import stat
from typing import Any

import pytest
from equipoise.gpuctl.engine.errors import HandoverError, ListenError
from equipoise.gpuctl.engine.peer.service import PeerService
from equipoise.gpuctl.engine.schedule.sequence import (
    FinishReason,
    SamplingParams,
    SessionId,
    TokenLogprob,
)
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from equipoise.tests.gpuctl.engine.peer.peers import (
    EXPECTED,
    PROMPT,
    TIMEOUT_S,
    TOKENS,
    Peer,
    peers,
)


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
        refused = "just arriving"
        async with asyncio.timeout(TIMEOUT_S):
            while "just arriving" in refused:  # b says so until its part of the hand-over is over; then a refuses
                with pytest.raises(HandoverError) as error:
                    await b.service.hand_over(SessionId("s"), a.address)
                refused = str(error.value)
        assert "already" in refused
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
