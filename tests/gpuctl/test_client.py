"""An engine's end of the hook: any engine that does what HookedEngine asks, attached to a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from equipoise.gpuctl.api.v1 import engine_pb2 as pb
from equipoise.gpuctl.client import attach
from equipoise.gpuctl.directives import Directive, DirectiveBase, Drop, Outcome, OutcomeStatus, Retain
from equipoise.gpuctl.peers import Peer, PeerIs, Peers
from equipoise.gpuctl.reports import EngineFacts, Listener, Reported, TurnStarted
from equipoise.policies.model import CostModel, SessionId, TenantId, TurnId
from equipoise.tests.gpuctl.engine.attaching import Daemon, serving

SUPPORTED: frozenset[type[DirectiveBase]] = frozenset((Retain, Drop))


class OtherEngine:
    """Not the embedded one: it can retain and drop, and does at once what it is told."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.directed: list[Directive] = []
        self.released_count = 0

    def facts(self) -> EngineFacts:
        return EngineFacts("other-1", "other", "m", 7, 16, 1000, 0, 0, CostModel(), SUPPORTED)

    def listen(self, listener: Listener) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def direct(self, directive: Directive) -> None:
        self.directed.append(directive)
        for listener in self.listeners:
            listener(Reported(5, Outcome(directive.directive_id, OutcomeStatus.COMPLETED, "done")))

    def release_holds(self) -> None:
        self.released_count += 1


@asynccontextmanager
async def attached(engine: OtherEngine, path: Path, peers: Peers | None = None) -> AsyncIterator[Daemon]:
    async with serving(str(path)) as daemon:
        attaching = asyncio.create_task(attach(f"unix:{path}", engine, peers))
        await daemon.until(lambda: bool(daemon.of("hello")) and bool(engine.listeners))
        yield daemon
        attaching.cancel()
        await asyncio.gather(attaching, return_exceptions=True)


async def test_an_engine_says_itself_what_it_is_and_what_it_can_apply(tmp_path):
    async with attached(OtherEngine(), tmp_path / "s") as daemon:
        (hello,) = daemon.of("hello")
        assert (hello.engine_id, hello.kind, hello.bytes_per_token) == ("other-1", "other", 16)
        assert set(hello.supported_directives) == {"retain", "drop"}


async def test_reports_and_outcomes_of_any_engine_arrive(tmp_path):
    engine = OtherEngine()
    async with attached(engine, tmp_path / "s") as daemon:
        started = TurnStarted(SessionId("s"), TenantId("t"), TurnId("x"), 5, 2, None)
        for listener in engine.listeners:
            listener(Reported(9, started))
        outcome = await daemon.ask("d1", drop=pb.Drop(session_id="s", from_token=3))
        assert (outcome.status, outcome.reason) == (pb.DIRECTIVE_STATUS_COMPLETED, "done")
        [dropped] = engine.directed
        assert isinstance(dropped, Drop) and (dropped.session_id, dropped.from_token) == ("s", 3)
        [told] = daemon.of("turn_started")
        assert (told.session_id, told.cached_tokens, told.peer_port) == ("s", 2, 0)


async def test_a_directive_that_the_engine_does_not_support_is_rejected_and_never_reaches_it(tmp_path):
    engine = OtherEngine()
    async with attached(engine, tmp_path / "s") as daemon:
        outcome = await daemon.ask("d1", hold=pb.Hold(session_id="s", ttl_ns=10**9))
        assert outcome.status == pb.DIRECTIVE_STATUS_REJECTED
        assert outcome.reason == "directive hold: not known to this engine"
        assert engine.directed == []


async def test_when_the_stream_is_lost_the_holds_end_and_nobody_listens_any_more(tmp_path):
    engine = OtherEngine()
    async with attached(engine, tmp_path / "s"):
        assert engine.released_count == 0
    assert engine.released_count == 1 and engine.listeners == []


async def test_who_a_client_is_goes_up_as_a_question_and_comes_down_as_an_answer(tmp_path):
    peers, peer = Peers(), Peer("127.0.0.1", 4711, 55)
    async with attached(OtherEngine(), tmp_path / "s", peers) as daemon:
        asking = asyncio.create_task(peers.who(peer))
        await daemon.until(lambda: bool(daemon.of("peer_seen")))
        [seen] = daemon.of("peer_seen")
        assert (seen.peer_address, seen.peer_port, daemon.reports[-1].at_ns) == ("127.0.0.1", 4711, 55)
        told = pb.PeerIs(peer_address="127.0.0.1", peer_port=4711, tenant_id="gold", sandbox="gold/ada", session_id="s")
        await daemon.send("", peer_is=told)
        while (known := await peers.who(peer)) is None:
            await asyncio.sleep(0.01)
        assert known == PeerIs("127.0.0.1", 4711, TenantId("gold"), "gold/ada", SessionId("s"))
        assert await asking in (None, known)
        assert not daemon.of("directive_outcome"), "it is no directive"
    assert await peers.who(Peer("127.0.0.1", 4712, 56)) is None, "the daemon is gone: nobody is asked"
