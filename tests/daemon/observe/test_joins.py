"""Whose an engine's peer is: by address and port, time, namespace and where the connection led."""

from __future__ import annotations

from typing import Any

import pytest
from equipoise.daemon.observe import joins as joins_module
from equipoise.daemon.observe.joins import ACCEPTED_WITHIN_NS, Joins
from equipoise.daemon.sandboxes.witness import Owner
from equipoise.policies.events import (
    ConnectionOpened,
    EngineAttached,
    EngineDetached,
    Event,
    SandboxRegistered,
    SandboxRemoved,
    SessionJoined,
)
from equipoise.policies.model import CgroupId, SessionId, ToolCallId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import ADA, ENGINE, engine, ns, observed, sandbox, session, turn_started

HOME, AWAY, FURTHER = 100, 200, 300
"""Network namespaces; the engine is at home."""
OURS = engine(listen_addresses=("127.0.0.1:8800",))
ANYWHERE = engine(listen_addresses=("0.0.0.0:8800",))


class Host:
    """gold/ada in cgroup 1, silver/bo in cgroup 2, and an engine."""

    def __init__(self, home: int | None = HOME) -> None:
        self.events: list[Event] = []
        self.unseen: list[ConnectionOpened] = []
        self.state = State().apply(SandboxRegistered(0, sandbox()))
        self.state.apply(SandboxRegistered(0, sandbox(2, tenant="silver", name="bo"))).apply(EngineAttached(0, OURS))
        self.joins = Joins(self.state, self._drain, self.events.append, lambda pid: home)

    def _drain(self) -> None:
        for event in self.unseen:
            self.joins.opened(event)
        self.unseen.clear()

    def opened(
        self,
        at_s: float,
        cgroup: int = 1,
        local: tuple[str, int] = ("127.0.0.1", 40_000),
        remote: tuple[str, int] = ("127.0.0.1", 8800),
        namespace: int = HOME,
        pid: int = 7,
    ) -> None:
        self.unseen.append(
            ConnectionOpened(ns(at_s), CgroupId(cgroup), ToolCallId(1), pid, True, *local, *remote, namespace)
        )

    def who(self, at_s: float, of: Any = OURS, peer: tuple[str, int] = ("127.0.0.1", 40_000)) -> str | None:
        found = self.joins.who(of, *peer, ns(at_s))
        return found.label if found else None

    def joined(self, at_s: float, peer: tuple[str, int] = ("127.0.0.1", 40_000), of: SessionId = ADA) -> list[Any]:
        """What the loop is told when a turn starts."""
        self.events.clear()
        started = turn_started(at_s, session=of, peer_address=peer[0], peer_port=peer[1])
        self.state.apply(started)
        self.joins(started, self.state)
        for event in self.events:
            self.state.apply(event)
        return [(e.session, e.sandbox) for e in self.events if isinstance(e, SessionJoined)]


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_peer_is_the_sandbox_that_opened_its_connection(host):
    host.opened(1.0)
    host.opened(1.0, cgroup=2, local=("127.0.0.1", 40_001))
    assert host.who(1.001) == "gold/ada", "even where the kernel's word was still unread"
    assert host.who(1.001, peer=("127.0.0.1", 40_001)) == "silver/bo"
    assert host.who(1.001, peer=("127.0.0.1", 40_002)) is None


def test_a_port_that_is_used_again_is_its_newest_users(host):
    host.opened(1.0)
    host.opened(2.0, cgroup=2)
    assert host.who(2.001) == "silver/bo"


def test_a_connection_of_long_ago_says_nothing_about_one_of_now(host):
    host.opened(1.0)
    assert host.who(1.0 + ACCEPTED_WITHIN_NS / 1e9 + 0.1) is None
    assert host.who(0.5) is None, "nor one of later about one of before"
    assert host.who(0.95) == "gold/ada", "but the handshake's last packet is under way for a while"


def test_a_connection_to_elsewhere_is_none_to_the_engine(host):
    host.opened(1.0, remote=("127.0.0.1", 5432))
    host.opened(1.0, local=("127.0.0.1", 40_001), remote=("127.0.0.2", 8800))
    assert host.who(1.0) is None
    assert host.who(1.0, peer=("127.0.0.1", 40_001)) is None
    assert host.who(1.0, of=ANYWHERE, peer=("127.0.0.1", 40_001)) == "gold/ada"


def test_an_engine_that_does_not_say_where_it_listens_may_be_reached_anywhere(host):
    host.opened(1.0, remote=("127.0.0.1", 5432))
    assert host.who(1.0, of=engine()) == "gold/ada"


def test_an_engine_on_an_ipv6_address(host):
    host.opened(1.0, local=("::1", 40_000), remote=("::1", 8800))
    assert host.who(1.0, of=engine(listen_addresses=("[::1]:8800",)), peer=("::1", 40_000)) == "gold/ada"
    assert host.who(1.0, of=engine(listen_addresses=("[::]:8800",)), peer=("::1", 40_000)) == "gold/ada"


# -- namespaces: whoever may make one can make any address and port in it


def test_the_engines_own_namespace_goes_before_all_others(host):
    host.opened(1.0)
    host.opened(1.001, cgroup=2, namespace=AWAY)
    assert host.who(1.002) == "gold/ada", "though the other is newer"


def test_a_loopback_address_of_another_namespace_is_not_the_engines(host):
    host.opened(1.0, cgroup=2, namespace=AWAY)
    assert host.who(1.001) is None


def test_a_peer_from_another_namespace_is_known_unless_two_could_be_meant(host):
    there = ("10.0.0.2", 40_000)
    host.opened(1.0, local=there, remote=("10.0.0.1", 8800), namespace=AWAY)
    assert host.who(1.001, of=ANYWHERE, peer=there) == "gold/ada"
    host.opened(1.002, cgroup=2, local=there, remote=("10.0.0.1", 8800), namespace=FURTHER)
    assert host.who(1.003, of=ANYWHERE, peer=there) is None


def test_where_the_engines_namespace_is_not_known_the_only_one_is_meant():
    host = Host(home=None)
    host.opened(1.0, namespace=AWAY)
    assert host.who(1.001) == "gold/ada"
    host.opened(1.0, cgroup=2, namespace=FURTHER)
    assert host.who(1.001) is None


# -- bounds


def test_what_is_remembered_is_bounded(host, monkeypatch):
    monkeypatch.setattr(joins_module, "REMEMBERED_COUNT", 3)
    for port in range(5):
        host.opened(1.0, local=("127.0.0.1", port))
    assert [host.who(1.0, peer=("127.0.0.1", port)) for port in range(5)] == [None, None, *["gold/ada"] * 3]
    assert len(host.joins._opened) == len(host.joins._peers) == 3
    for namespace in range(200):
        host.opened(1.0, local=("10.0.0.2", 9), namespace=namespace + 1000)
    host.who(1.0)
    assert len(host.joins._opened["10.0.0.2", 9]) == joins_module.NAMESAKES_COUNT


# -- sessions


def test_each_turn_on_a_known_peers_connection_joins_its_session(host):
    host.opened(1.0)
    host.who(1.0)
    assert host.joined(1.1) == [(ADA, CgroupId(1))]
    assert host.joined(500.0, of=SessionId("other")) == [(SessionId("other"), CgroupId(1))], (
        "a connection may live long"
    )


def test_a_turn_is_of_the_process_that_opened_its_connection_unless_two_could_be_meant(host):
    turn = turn_started(1.1, peer_address="10.0.0.2", peer_port=9)
    host.opened(1.0, local=("10.0.0.2", 9), namespace=AWAY, pid=7)
    host.who(1.0, peer=("10.0.0.2", 9))
    assert host.joins.owner_at(turn) == Owner(CgroupId(1), 7)
    host.opened(1.0, local=("10.0.0.2", 9), namespace=FURTHER, pid=8)
    host.who(1.0, peer=("10.0.0.2", 9))
    assert host.joins.owner_at(turn) == Owner(CgroupId(1), None)


def test_a_session_is_joined_once(host):
    host.opened(1.0)
    host.who(1.0)
    host.state.apply(observed(1.0, session("gold/ada")))
    assert host.joined(1.1) and not host.joined(2.0)


def test_a_turn_of_nobody_we_know_joins_nothing(host):
    assert host.who(1.0) is None
    host.opened(1.05)  # afterwards: it is another connection's
    host.joins._drain()
    assert host.joined(1.1) == []


def test_an_engine_that_never_asks_is_joined_by_turns_soon_after_their_connection(host):
    host.opened(1.0)
    host.joins._drain()
    assert host.joined(100.0) == []
    assert host.joined(1.5) == [(ADA, CgroupId(1))]


def test_a_sandbox_that_is_gone_is_nobody(host):
    host.opened(1.0)
    host.state.apply(SandboxRemoved(ns(1), CgroupId(1)))
    assert host.who(1.0) is None
    assert host.joined(1.1) == []


def test_an_engines_end_forgets_its_peers(host):
    host.opened(1.0)
    host.who(1.0)
    host.joins(EngineDetached(ns(2), ENGINE), host.state)
    assert not host.joins._peers
