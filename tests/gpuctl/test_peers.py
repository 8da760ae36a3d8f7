"""Asking who a client is: once a connection, not for long, and never in the way."""

from __future__ import annotations

import asyncio
import time

import pytest
from equipoise.gpuctl import peers as peers_module
from equipoise.gpuctl.peers import ANSWER_S, PATIENCE, Peer, PeerIs, Peers, plain_address
from equipoise.gpuctl.reports import PeerSeen, Reported
from equipoise.policies.model import SessionId, TenantId


def answer(port: int = 9, tenant: str = "gold") -> PeerIs:
    return PeerIs("127.0.0.1", port, TenantId(tenant), "gold/ada" if tenant else "", SessionId("gold/ada"))


def peer(port: int = 9) -> Peer:
    return Peer("127.0.0.1", port, 77)


class Daemon:
    """Keeps what it is asked; answers at once where `answers`."""

    def __init__(self, peers: Peers, tenant: str | None = "gold") -> None:
        self.asked: list[Reported] = []
        self.tenant = tenant
        self._peers = peers
        self.leave = peers.listen(self._asked)

    def _asked(self, reported: Reported) -> None:
        self.asked.append(reported)
        if self.tenant is not None:
            assert isinstance(reported.report, PeerSeen)
            self._peers.take(answer(reported.report.peer_port, self.tenant))


@pytest.fixture
def peers() -> Peers:
    return Peers()


async def test_the_daemon_is_asked_once_a_connection(peers):
    daemon, one = Daemon(peers), peer()
    assert await peers.who(one) == await peers.who(one) == answer()
    assert daemon.asked == [Reported(77, PeerSeen("127.0.0.1", 9))]
    assert await peers.who(peer()) == answer()
    assert len(daemon.asked) == 2, "another connection, from the same port"


async def test_without_a_daemon_nobody_waits_and_nobody_is_known(peers):
    one = peer()
    began = time.monotonic()
    assert await peers.who(one) is None
    assert time.monotonic() - began < ANSWER_S / 2
    daemon = Daemon(peers)
    assert await peers.who(one) == answer(), "asked when one has come"
    daemon.leave()
    assert await peers.who(one) == answer() and await peers.who(peer(10)) is None


async def test_who_the_daemon_does_not_know_is_not_asked_about_again(peers):
    daemon, one = Daemon(peers, tenant=""), peer()
    assert await peers.who(one) is None and await peers.who(one) is None
    assert len(daemon.asked) == 1


async def test_an_answer_is_waited_for_but_not_for_long_and_serves_the_next_request_when_it_is_late(peers):
    Daemon(peers, tenant=None)
    one = peer()
    began = time.monotonic()
    assert await peers.who(one) is None
    assert ANSWER_S * 0.9 < time.monotonic() - began < ANSWER_S + 1
    began = time.monotonic()
    assert await peers.who(one) is None
    assert time.monotonic() - began < ANSWER_S / 2, "only a connection's first request waits"
    peers.take(answer())
    assert await peers.who(one) == answer()


async def test_a_daemon_that_never_answers_is_not_waited_for_after_some_questions(peers, monkeypatch):
    monkeypatch.setattr(peers_module, "ANSWER_S", 0.01)
    daemon = Daemon(peers, tenant=None)
    for port in range(PATIENCE):
        await peers.who(peer(port))
    monkeypatch.setattr(peers_module, "ANSWER_S", 5.0)
    last = peer(99)
    assert await asyncio.wait_for(peers.who(last), 1) is None
    assert len(daemon.asked) == PATIENCE + 1, "it is asked all the same"
    peers.take(answer(99))
    daemon.tenant = "gold"
    assert await peers.who(last) == await peers.who(peer(99)) == answer(99), "and believed when it answers"


async def test_an_answer_about_a_connection_that_is_gone_is_nothing(peers):
    Daemon(peers)
    peers.take(answer(5))
    assert await peers.who(peer(9)) == answer()


@pytest.mark.parametrize(
    ("told", "plain"),
    [
        ("::ffff:10.0.0.2", "10.0.0.2"),
        ("fe80::1%eth0", "fe80::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_is_as_the_kernel_tells_it(told, plain):
    assert plain_address(told) == plain
