"""Who an engine's clients are: asked of the daemon once for each connection, known as long as it lasts.

Owns: the questions under way, and how long to wait for an answer. Must not: decide what a client may do, or do I/O
(client.py carries question and answer). Fail-open: without a daemon, or without an answer in time, nobody is known. For
one event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from ..policies.model import SessionId, TenantId
from .reports import Listener, PeerSeen, Reported

_log = logging.getLogger(__name__)

ANSWER_S = 3.0
"""Longest wait for an answer, which comes within milliseconds, or some 100 ms where the host has no CPU to spare."""
PATIENCE = 3
"""After so many questions without one answer the daemon is taken for one that does not know them: nobody waits then."""

_BY_PID = "pid:"


@dataclass(frozen=True, slots=True)
class PeerIs:
    """The daemon's answer."""

    peer_address: str
    peer_port: int
    tenant_id: TenantId
    """Empty: it runs in no sandbox that the daemon knows."""
    sandbox: str
    session_id: SessionId


class Peer:
    """The other end of one connection."""

    def __init__(self, address: str, port: int, accepted_ns: int) -> None:
        """`address` as the socket tells it. `accepted_ns`: CLOCK_MONOTONIC."""
        self.address = plain_address(address)
        self.port = port
        self.accepted_ns = accepted_ns
        self.answer: PeerIs | None = None
        self.answered = asyncio.Event()
        self.asked_of: object = None
        """The stream the question went to."""


class Peers:
    def __init__(self) -> None:
        self._stream: Listener | None = None
        self._unanswered = 0
        self._asked: weakref.WeakValueDictionary[tuple[str, int], Peer] = weakref.WeakValueDictionary()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """A daemon is there: hand `listener` the questions from now on. Returns how to stop it."""
        self._stream, self._unanswered = listener, 0

        def stop() -> None:
            if self._stream is listener:
                self._stream = None

        return stop

    def take(self, answer: PeerIs) -> None:
        """Safe where nobody asked, or the connection is gone. A late answer serves the connection's next request."""
        self._unanswered = 0
        peer = self._asked.get((answer.peer_address, answer.peer_port))
        if peer is not None:
            peer.answer = answer
            peer.answered.set()

    async def who(self, peer: Peer) -> PeerIs | None:
        """Whose connection it is; None where that is not known. Waits at a connection's first call only."""
        stream = self._stream
        if peer.answer is None and stream is not None and peer.asked_of is not stream:
            peer.asked_of = stream
            self._asked[peer.address, peer.port] = peer
            stream(Reported(peer.accepted_ns, PeerSeen(peer.address, peer.port)))
            if self._unanswered < PATIENCE:
                await self._wait(peer)
        return peer.answer if peer.answer is not None and peer.answer.tenant_id else None

    async def _wait(self, peer: Peer) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await peer.answered.wait()
        except TimeoutError:
            self._unanswered += 1
            _log.warning("peer_not_told address=%s port=%d waited_s=%g", peer.address, peer.port, ANSWER_S)


def local_address(pid: int) -> str:
    """What stands for the address of a client that came by a unix socket: its process tells who it is."""
    return f"{_BY_PID}{pid}"


def local_pid(address: str) -> int | None:
    """The process of a local_address(); None: it is an address of a network."""
    pid = address.removeprefix(_BY_PID)
    return int(pid) if pid != address and pid.isdecimal() else None


def plain_address(address: str) -> str:
    """Without its interface, and an IPv4 address in dotted form also where a socket of both families tells it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
