"""The daemon's gRPC server on its unix socket: claiming the path, the services, health, reflection."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import stat
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...gpuctl.api.v1 import engine_pb2, engine_pb2_grpc
from ..api.v1 import policy_pb2, policy_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from ..errors import ListenError

SOCKET_MODE = 0o660
LONGEST_SOCKET = 107
"""Of sockaddr_un's 108 bytes, see unix(7)."""


def claim_socket(path: Path) -> None:
    """Make way for our socket: a dead daemon's file goes, a living daemon's is an error. Raises ListenError."""
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise ListenError(f"{path}: too long for a socket, at most {LONGEST_SOCKET} bytes: give --socket another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise ListenError(f"{path.parent}: {error.strerror}: give --state-dir a folder that is yours") from error
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"{path}: {error.strerror}: give --socket a path that is yours") from error
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: is there and is no socket: remove it, or give --socket another path")
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            reason = error.strerror or error
            raise ListenError(f"{path}: {reason}: remove it, or give --socket another path") from error
    raise ListenError(f"{path}: another daemon listens there: stop it, or give --socket another path")


async def serve(
    path: Path,
    sandboxes: sandbox_pb2_grpc.SandboxServiceServicer,
    policy: policy_pb2_grpc.PolicyServiceServicer,
    engines: engine_pb2_grpc.EngineServiceServicer,
    parts: contextlib.AsyncExitStack,
) -> None:
    """Listen at `path` until `parts` is left. Raises ListenError."""
    server = grpc.aio.server()
    sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(sandboxes, server)
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(policy, server)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(engines, server)
    answering = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs leave aio out
    health_pb2_grpc.add_HealthServicer_to_server(answering, server)
    names = [
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in (
            (sandbox_pb2, "SandboxService"),
            (policy_pb2, "PolicyService"),
            (engine_pb2, "EngineService"),
            (health_pb2, "Health"),
        )
    ]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    for name in ("", *names):
        await answering.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ListenError(f"{path}: cannot listen there: {error}") from error
    await server.start()
    path.chmod(SOCKET_MODE)

    async def stop() -> None:
        await server.stop(grace=0.5)
        path.unlink(missing_ok=True)

    parts.push_async_callback(stop)
