"""The daemon's end of the engine hook, driven by a real gRPC client over a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from equipoise.gpuctl import hook as hook_module
from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.api.v1 import engine_pb2_grpc
from equipoise.gpuctl.hook import EngineHook
from equipoise.policies.accounting import TurnCost
from equipoise.policies.actions import (
    Decision,
    Drop,
    EngineAction,
    Hold,
    OutcomeStatus,
    Release,
    Retain,
    SetTenantWeight,
    SwapOut,
)
from equipoise.policies.events import EngineAttached, EngineDetached, Event, KvObserved, OutcomeObserved, TurnEnded
from equipoise.policies.model import CgroupId, DecisionId, EngineId, KvTier, Sandbox, SessionId, TenantId

ENGINE = EngineId("e1")
SESSION = SessionId("s1")
NOW_NS = 5_000


class Engine:
    """The client's end: says hello, reports, takes directives."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stream = engine_pb2_grpc.EngineServiceStub(channel).Attach()

    async def hello(self, engine_id: str = ENGINE) -> None:
        await self.report(hello=pb.EngineHello(engine_id=engine_id, kind="fake", bytes_per_token=7))

    async def report(self, at_ns: int = 1_000, **report: Any) -> None:
        await self.stream.write(pb.EngineReport(at_ns=at_ns, **report))

    async def outcome(self, directive: str, status: pb.DirectiveStatus, reason: str = "", at_ns: int = 7_000) -> None:
        told = pb.DirectiveOutcome(directive_id=directive, status=status, reason=reason)
        await self.report(at_ns, directive_outcome=told)

    async def directive(self) -> pb.EngineDirective:
        read: pb.EngineDirective = await asyncio.wait_for(self.stream.read(), 5)
        assert read, "the stream has ended"
        return read


class Served:
    """The hook in a server of its own."""

    def __init__(self, socket: Path) -> None:
        self.events: list[Event] = []
        self.hook = EngineHook(self.events.append, lambda: NOW_NS)
        self.server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self.hook, self.server)
        self.server.add_insecure_port(f"unix:{socket}")
        self.channel = grpc.aio.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "localhost")])

    def engine(self) -> Engine:
        return Engine(self.channel)

    async def attached(self, engine_id: str = ENGINE) -> Engine:
        engine = self.engine()
        await engine.hello(engine_id)
        await self.until(lambda: EngineId(engine_id) in self.hook.attached)
        return engine

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def outcomes(self) -> list[tuple[str, OutcomeStatus, str]]:
        return [(e.outcome.decision, e.outcome.status, e.outcome.detail) for e in self.of(OutcomeObserved)]

    @staticmethod
    async def until(claim) -> None:
        async with asyncio.timeout(5):
            while not claim():
                await asyncio.sleep(0.005)

    def send(self, action: EngineAction, id: str = "d1"):
        decision = Decision(DecisionId(id), 0, "r", 0, 0, "", action, TenantId("gold"), "s", "e")
        return self.hook.send(decision, action)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path / "hook.sock")
    await made.server.start()
    yield made
    await made.channel.close(None)
    await made.server.stop(0)


RETAIN = Retain(ENGINE, SESSION, 3_000, 9_000)


async def test_an_engine_attaches_by_its_hello_and_detaches_by_ending_its_stream(served):
    engine = await served.attached()
    [attached] = served.of(EngineAttached)
    assert (attached.at_ns, attached.engine.id, attached.engine.bytes_per_token) == (1_000, ENGINE, 7)
    await engine.stream.done_writing()
    await served.until(lambda: served.of(EngineDetached))
    assert served.of(EngineDetached) == [EngineDetached(NOW_NS, ENGINE)] and served.hook.attached == ()


@pytest.mark.parametrize(
    "first", [{"occupancy": pb.Occupancy()}, {"hello": pb.EngineHello()}, {}], ids=["occupancy", "no id", "nothing"]
)
async def test_a_first_report_that_is_no_hello_is_refused(served, first):
    engine = served.engine()
    await engine.report(**first)
    assert await engine.stream.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must be a Hello with an engine_id" in await engine.stream.details()
    assert served.events == [] and served.hook.attached == ()


async def test_a_stream_that_ends_before_its_hello_is_refused(served):
    engine = served.engine()
    await engine.stream.done_writing()
    assert await engine.stream.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reports_become_events_in_their_order(served):
    engine = await served.attached()
    for used in (1, 2, 3):
        await engine.report(occupancy=pb.Occupancy(device_used_tokens=used))
    await served.until(lambda: len(served.of(KvObserved)) == 3)
    assert [e.device_used_tokens for e in served.of(KvObserved)] == [1, 2, 3]


async def test_what_a_turn_cost_arrives_and_what_the_engine_left_out_stays_unknown(served):
    engine = await served.attached()
    told = pb.TurnEnded(
        turn_id="t1",
        cost=pb.TurnCost(pte=43.06, wasted_pte=13, energy_joules=0.0, duration_ns=30, ideal_ns=10),
    )
    await engine.report(turn_ended=told)
    await engine.report(turn_ended=pb.TurnEnded(turn_id="t2", cost=pb.TurnCost(duration_ns=30)))
    await served.until(lambda: len(served.of(TurnEnded)) == 2)
    measured, bare = [event.cost for event in served.of(TurnEnded)]
    assert measured == TurnCost(pte=43.06, wasted_pte=13, energy_joules=0.0, duration_ns=30, ideal_ns=10)
    assert measured.slowdown_ratio == 3
    assert bare == TurnCost(pte=None, wasted_pte=0, energy_joules=None, duration_ns=30, ideal_ns=None)


async def test_actions_go_out_as_directives_with_the_decisions_id_and_deadline(served):
    engine = await served.attached()
    for number, action in enumerate(
        (
            RETAIN,
            SwapOut(ENGINE, SESSION, KvTier.DISK, 9_000),
            Drop(ENGINE, SESSION, 12, 9_000),
            SetTenantWeight(ENGINE, TenantId("gold"), 2.5, 9_000),
        )
    ):
        assert served.send(action, f"d{number}") is None
    got = [await engine.directive() for _ in range(4)]
    assert [d.directive_id for d in got] == ["d0", "d1", "d2", "d3"] and {d.deadline_ns for d in got} == {9_000}
    assert (got[0].retain.session_id, got[0].retain.ttl_ns) == (SESSION, 3_000)
    assert got[1].swap_out.tier == pb.KV_TIER_DISK and got[2].drop.from_token == 12
    assert (got[3].set_tenant_weight.tenant_id, got[3].set_tenant_weight.weight) == ("gold", 2.5)


@pytest.mark.parametrize(
    ("told", "status"),
    [
        (pb.DIRECTIVE_STATUS_ACCEPTED, OutcomeStatus.ACCEPTED),
        (pb.DIRECTIVE_STATUS_CLIPPED, OutcomeStatus.CLIPPED),
        (pb.DIRECTIVE_STATUS_DEFERRED, OutcomeStatus.DEFERRED),
        (pb.DIRECTIVE_STATUS_REJECTED, OutcomeStatus.REJECTED),
        (pb.DIRECTIVE_STATUS_COMPLETED, OutcomeStatus.COMPLETED),
        (pb.DIRECTIVE_STATUS_EXPIRED, OutcomeStatus.EXPIRED),
        (pb.DIRECTIVE_STATUS_UNSPECIFIED, OutcomeStatus.FAILED),
    ],
)
async def test_outcomes_are_told_with_who_did_it_and_how_long_it_took(served, told, status):
    engine = await served.attached()
    served.send(RETAIN)
    await engine.outcome("d1", told, "so it is")
    await served.until(lambda: served.of(OutcomeObserved))
    outcome = served.of(OutcomeObserved)[0].outcome
    assert (outcome.decision, outcome.status, outcome.detail) == ("d1", status, "so it is")
    assert (outcome.tier, outcome.latency_ns) == ("engine fake", 7_000 - NOW_NS)


async def test_accepted_is_followed_by_completed_and_nothing_by_that(served):
    engine = await served.attached()
    served.send(RETAIN)
    for status in (pb.DIRECTIVE_STATUS_ACCEPTED, pb.DIRECTIVE_STATUS_COMPLETED, pb.DIRECTIVE_STATUS_REJECTED):
        await engine.outcome("d1", status)
    await engine.outcome("never sent", pb.DIRECTIVE_STATUS_COMPLETED)
    await engine.report(occupancy=pb.Occupancy())
    await served.until(lambda: served.of(KvObserved))
    assert [status for _, status, _ in served.outcomes()] == [OutcomeStatus.ACCEPTED, OutcomeStatus.COMPLETED]


async def test_what_is_open_when_an_engine_goes_is_gone(served):
    engine = await served.attached()
    served.send(RETAIN, "done")
    served.send(RETAIN, "open")
    await engine.outcome("done", pb.DIRECTIVE_STATUS_COMPLETED)
    await served.until(lambda: served.of(OutcomeObserved))
    engine.stream.cancel()
    await served.until(lambda: served.of(EngineDetached))
    assert served.outcomes()[1:] == [("open", OutcomeStatus.GONE, "the engine went away")]
    kinds = [type(e) for e in served.events]
    assert kinds.index(EngineDetached) == len(kinds) - 1


async def test_a_second_stream_of_an_engine_replaces_the_first(served):
    first = await served.attached()
    served.send(RETAIN, "old")
    await first.directive()
    second = served.engine()
    await second.hello()
    await served.until(lambda: len(served.of(EngineAttached)) == 2)
    assert served.outcomes() == [("old", OutcomeStatus.GONE, "the engine went away")]
    assert not await asyncio.wait_for(first.stream.read(), 5), "the end of the stream"
    served.send(RETAIN, "new")
    assert (await second.directive()).directive_id == "new"
    assert not served.of(EngineDetached), "it is still attached"


async def test_what_a_replaced_stream_still_says_is_not_heard(served):
    first = await served.attached()
    await served.attached("e1")
    await served.until(lambda: len(served.of(EngineAttached)) == 2)
    await asyncio.wait_for(first.stream.read(), 5)
    with pytest.raises(asyncio.InvalidStateError):
        await first.report(occupancy=pb.Occupancy())
    assert not served.of(KvObserved)


async def test_two_engines_get_each_their_own(served):
    one, two = await served.attached("e1"), await served.attached("e2")
    served.send(RETAIN, "for-one")
    served.send(Retain(EngineId("e2"), SESSION, 1, 2), "for-two")
    assert (await one.directive()).directive_id == "for-one"
    assert (await two.directive()).directive_id == "for-two"


async def test_a_hold_and_its_end_reach_the_engine_as_such(served):
    engine = await served.attached()
    served.send(Hold(ENGINE, SESSION, 10, 99), "hold")
    served.send(Release(ENGINE, SESSION, 99), "release")
    held, released = await engine.directive(), await engine.directive()
    assert (held.deadline_ns, held.hold) == (99, pb.Hold(session_id=SESSION, ttl_ns=10))
    assert (released.directive_id, released.release) == ("release", pb.Release(session_id=SESSION))


async def test_asking_an_engine_that_is_not_there_is_answered_at_once(served):
    outcome = served.send(RETAIN)
    assert outcome is not None and outcome.status is OutcomeStatus.GONE
    assert outcome.detail == "engine e1 is not attached"


async def test_a_slow_engine_is_not_asked_without_end(served, monkeypatch):
    monkeypatch.setattr(hook_module, "QUEUE_LENGTH", 3)
    await served.attached()
    answers = [served.send(RETAIN, f"d{n}") for n in range(5)]
    assert answers[:3] == [None] * 3
    assert answers[3] is not None and answers[3].status is OutcomeStatus.REJECTED
    assert answers[3].detail == "3 directives wait for the engine"


async def test_an_engine_that_asks_who_a_peer_is_gets_its_answer(served):
    ada = Sandbox(CgroupId(1), TenantId("gold"), "ada", "a/b", SessionId("talk"), None, 0)
    asked = []

    def who(engine, *peer):
        asked.append((engine.id, engine.listen_addresses, *peer))
        return ada if peer[1] == 1 else None

    served.hook._who = who
    engine = served.engine()
    await engine.report(hello=pb.EngineHello(engine_id=ENGINE, listen_addresses=["127.0.0.1:80"]))
    for port in (1, 2):
        await engine.report(77, peer_seen=pb.PeerSeen(peer_address="::1", peer_port=port))
    known, unknown = (await engine.directive()).peer_is, (await engine.directive()).peer_is
    assert known == pb.PeerIs(peer_address="::1", peer_port=1, tenant_id="gold", sandbox="gold/ada", session_id="talk")
    assert unknown == pb.PeerIs(peer_address="::1", peer_port=2)
    assert asked == [(ENGINE, ("127.0.0.1:80",), "::1", port, 77) for port in (1, 2)]
    assert [type(event) for event in served.events] == [EngineAttached], "it is no event"
