"""uvicorn's HTTP/1.1 connection: who is at its other end, with bounds on how long a client may leave its part undone.

Owns: the connection's peer, for its requests (`request.state.peer`), and two clocks uvicorn has not. One from
connecting, or a request's first byte, until its head is whole: then 408. One while the client does not read its
response: then the connection is closed, which cancels the turn. Must not: read requests (uvicorn) or their bodies
(http.py has a clock of its own for those).
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ...peers import Peer, local_address

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)
_BODY = (
    b'{"error":{"message":"the request did not arrive in time","type":"invalid_request_error",'
    b'"param":null,"code":"request_timeout"}}'
)


class Connection(H11Protocol):
    timeout_s: float = 30.0
    """For either clock."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_clock: asyncio.TimerHandle | None = None
        self._read_clock: asyncio.TimerHandle | None = None
        self._bytes_came = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it, too
        super().connection_made(transport)
        client = self.client or _local_client(transport)
        if client is not None:  # from the socket: no header speaks for it
            self.app_state = {**self.app_state, "peer": Peer(*client, time.monotonic_ns())}
        self._head_clock = self.loop.call_later(self.timeout_s, self._give_up_on_head)

    def data_received(self, data: bytes) -> None:
        self._bytes_came = True
        super().data_received(data)
        if self._answering():
            _stop(self._head_clock)
            self._head_clock = None
        elif self._head_clock is None and not self.transport.is_closing():
            self._head_clock = self.loop.call_later(self.timeout_s, self._give_up_on_head)

    def on_response_complete(self) -> None:
        self._bytes_came = False
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        _stop(self._read_clock)
        self._read_clock = self.loop.call_later(self.timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._read_clock)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head_clock)
        _stop(self._read_clock)
        super().connection_lost(exc)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up_on_head(self) -> None:
        if self._answering() or self.transport.is_closing():
            return
        if self._bytes_came:
            self.transport.write(_LATE % (len(_BODY), _BODY))
        self.transport.close()


_UCRED = struct.Struct("iII")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""
_CONNECTIONS = itertools.count(1)


def _local_client(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Who connected to our unix socket, and a number of that connection in place of a port; None: nobody to be named,
    as from another PID namespace.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    pid, _uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return (local_address(pid), next(_CONNECTIONS)) if pid else None


def _stop(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()


def connection_of(timeout_s: float) -> type[Connection]:
    """The class uvicorn is given as `http`."""
    return type("Connection", (Connection,), {"timeout_s": timeout_s})
