"""What an agent says to the daemon about its tool calls, and what it hears back, over gRPC.

Owns the agent's few calls. Every one is short and fails open: an agent works on when the daemon is slow or gone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from ...api.v1 import policy_pb2, policy_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc

_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the agent is for the daemon. `socket` None: there is no daemon to ask."""

    tenant: str
    name: str
    session: str
    socket: str | None


def _channel(socket: str) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{socket}", options=(("grpc.default_authority", "localhost"),))


def begin(socket: str, identity: Identity, command: str, external_id: str) -> str | None:
    """Announce a tool call; its id, or None where the daemon does not answer."""
    request = sandbox_pb2.BeginToolCallRequest(
        tenant_id=identity.tenant,
        name=identity.name,
        command=command,
        external_id=external_id,
        session_id=identity.session,
    )
    try:
        with _channel(socket) as channel:
            answer = sandbox_pb2_grpc.SandboxServiceStub(channel).BeginToolCall(request, timeout=_TIMEOUT_S)
            return str(answer.tool_call_id)
    except grpc.RpcError:
        return None


def end(socket: str, tool_call_id: str, exit_code: int | None) -> str:
    """Say that an announced call ended; the daemon's notice, empty where there is none."""
    request = sandbox_pb2.EndToolCallRequest(tool_call_id=tool_call_id)
    if exit_code is not None:
        request.exit_code = exit_code
    try:
        with _channel(socket) as channel:
            return str(sandbox_pb2_grpc.SandboxServiceStub(channel).EndToolCall(request, timeout=_TIMEOUT_S).notice)
    except grpc.RpcError:
        return ""


def why(socket: str, identity: Identity, pid: int) -> str:
    """Why the call whose root process was `pid` was ended, in one line; empty where the daemon did not do it.

    Asks for up to a second: the decision may be journalled a moment after the process is gone.
    """
    give_up = time.monotonic() + 1.0
    try:
        with _channel(socket) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            while True:
                if line := _explanation(stub, identity, pid):
                    return line
                if time.monotonic() > give_up:
                    return ""
                time.sleep(0.1)
    except grpc.RpcError:
        return ""


def _explanation(stub: policy_pb2_grpc.PolicyServiceStub, identity: Identity, pid: int) -> str:
    calls = stub.ListToolCalls(policy_pb2.ListToolCallsRequest(tenant_id=identity.tenant), timeout=_TIMEOUT_S)
    mine = [
        c
        for c in calls.tool_calls
        if c.sandbox.rpartition("/")[2] == identity.name and (c.pid == pid or c.signal == 9 or c.phase == "killed")
    ]
    if not mine:
        return ""
    newest = max(mine, key=lambda c: (c.pid == pid, c.start_ns))
    request = policy_pb2.ExplainRequest(tool_call_id=newest.tool_call_id, limit=10)
    for decision in stub.Explain(request, timeout=_TIMEOUT_S).decisions:
        if decision.action.startswith("kill"):
            return f"{decision.rule}: {decision.evidence}"
    return ""
