"""The peer service of an engine: sessions to and from other engines of the host, over unix sockets.

Owns: the socket and the hand-overs under way. Must not: know how a session goes (giving_rpc.py, taking_rpc.py).
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ...api.v1 import peer_pb2 as pb
from ...api.v1 import peer_pb2_grpc
from ..engine import Engine
from ..errors import HandoverError, ListenError
from ..schedule.sequence import SessionId
from .giving_rpc import PeerGiver
from .taking_rpc import PeerTaker

DEFAULT_TIMEOUT_MS = 30_000
MAX_TIMEOUT_MS = 3_600_000


def socket_path(address: str) -> Path:
    """The path of `unix:/path`. Raises HandoverError for any other address."""
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise HandoverError(f"{address}: give a peer address such as unix:/run/a.sock", status="INVALID_ARGUMENT")
    return Path(path)


class PeerService(peer_pb2_grpc.EnginePeerServiceServicer):
    """Serves one engine's peers. Used within one event loop."""

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        """`fingerprint`: of the model and the build, equal where KV can be exchanged."""
        self._giver = PeerGiver(engine, fingerprint)
        self._taker = PeerTaker(engine, fingerprint)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._path: Path | None = None

    async def start(self, address: str) -> None:
        """Listen at `unix:/path`, which only this user can open. Raises ListenError."""
        try:
            self._path = socket_path(address)
        except HandoverError as error:
            raise ListenError(f"--peer {error}") from None
        _clear(self._path)
        self._server = grpc.aio.server()
        peer_pb2_grpc.add_EnginePeerServiceServicer_to_server(self, self._server)
        # Set before the socket exists: changed after, anybody could have connected in between.
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:
            raise ListenError(f"--peer {address}: cannot listen there: give a path in a folder of yours") from None
        finally:
            os.umask(mask)
        await self._server.start()

    async def stop(self) -> None:
        """End what is under way: relayed turns end as cancelled, givers are told to go on by themselves."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace=0.5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def HandOver(
        self, request: pb.HandOverRequest, context: grpc.aio.ServicerContext[pb.HandOverRequest, pb.HandOverResponse]
    ) -> pb.HandOverResponse:
        try:
            return await self.hand_over(SessionId(request.session_id), request.to, request.timeout_ms)
        except HandoverError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
            raise

    async def hand_over(self, session_id: SessionId, to: str, timeout_ms: int = 0) -> pb.HandOverResponse:
        """Hand the session over; the answer once the other engine has it. Raises HandoverError.

        A caller that goes away does not stop it.
        """
        if not 0 <= timeout_ms <= MAX_TIMEOUT_MS:
            raise HandoverError(f"timeout_ms: {timeout_ms}: give at most an hour", status="INVALID_ARGUMENT")
        path = socket_path(to)
        if self._path is not None and path.exists() and path.samefile(self._path):
            raise HandoverError(f"{to}: an engine cannot hand a session to itself", status="INVALID_ARGUMENT")
        handed: asyncio.Future[pb.HandOverResponse] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._giver.give(session_id, to, timeout_ms or DEFAULT_TIMEOUT_MS, handed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(handed)

    async def Take(
        self, request_iterator: Any, context: grpc.aio.ServicerContext[pb.SessionPart, pb.TakenEvent]
    ) -> None:
        await self._taker.take(context)


def _clear(path: Path) -> None:
    """Remove a socket nobody listens on any more. Raises ListenError where somebody does, or it is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"--peer unix:{path}: {error.strerror}: give another path") from None
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"--peer unix:{path}: exists and is no socket: give another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ListenError(f"--peer unix:{path}: another engine listens there: give another path")
