"""The dashboard's line to the daemon: Watch as long as it lasts, and again when it breaks off.

Owns the channel and the reconnecting. Must not: know of widgets.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..daemon.api.v1 import policy_pb2, policy_pb2_grpc

RETRY_FIRST_S = 0.3
RETRY_MOST_S = 3.0
_TIMEOUT_S = 5.0


class NoDaemon(Exception):
    """Nobody answers; one line with the socket and the remedy."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream broke off; it will be tried again."""

    reason: str
    retry_s: float


def default_socket() -> str:
    """As the other commands choose it: EQUIPOISE_SOCKET, else the daemon's default state folder."""
    if given := os.environ.get("EQUIPOISE_SOCKET"):
        return given
    if os.geteuid() == 0:
        return "/run/equipoise/equipoise.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "equipoise" if runtime else Path.home() / ".local/state/equipoise"
    return str(folder / "equipoise.sock")


class Connection:
    """One channel to one daemon. `watch()` never ends by itself; close() does."""

    def __init__(self, socket: str) -> None:
        self.socket = socket.removeprefix("unix:")
        self._channel = grpc.aio.insecure_channel(
            f"unix:{self.socket}",
            options=(
                ("grpc.default_authority", "localhost"),
                # A daemon that was started again should be found soon, not after gRPC's default of up to 2 minutes.
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2000),
            ),
        )
        self._stub = policy_pb2_grpc.PolicyServiceStub(self._channel)

    async def watch(self, interval_ms: int) -> AsyncIterator[policy_pb2.WatchResponse | Lost]:
        """Every answer; a Lost whenever the stream breaks off, before it is tried again after a pause."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                async for response in self._stub.Watch(policy_pb2.WatchRequest(interval_ms=interval_ms)):
                    pause_s = RETRY_FIRST_S
                    yield response
                reason = "the daemon is stopping"
            except grpc.aio.AioRpcError as error:
                reason = reason_of(error, self.socket)
            yield Lost(reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_MOST_S, 2 * pause_s)

    async def explain(self, tool_call_id: str) -> list[policy_pb2.DecisionView]:
        """The decisions about one tool call, newest first. Raises NoDaemon."""
        request = policy_pb2.ExplainRequest(tool_call_id=tool_call_id, limit=100)
        try:
            answer = await self._stub.Explain(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise NoDaemon(reason_of(error, self.socket)) from None
        return list(answer.decisions)

    async def close(self) -> None:
        await self._channel.close(None)


def check(socket: str) -> None:
    """Raise NoDaemon unless a daemon answers at `socket`."""
    path = socket.removeprefix("unix:")
    if not Path(path).exists():
        raise NoDaemon(f"no daemon at {path}: start one with `equipoise daemon`, or give --socket")
    with grpc.insecure_channel(f"unix:{path}", options=(("grpc.default_authority", "localhost"),)) as channel:
        try:
            policy_pb2_grpc.PolicyServiceStub(channel).GetStatus(policy_pb2.GetStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise NoDaemon(reason_of(error, path)) from None


def reason_of(error: grpc.RpcError, path: str) -> str:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return str(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if Path(path).exists() and not os.access(path, os.R_OK | os.W_OK):
            return f"{path}: permission denied: run as root, or as a member of the socket's group"
        return f"the daemon at {path} does not answer"
    return error.details() or error.code().name
