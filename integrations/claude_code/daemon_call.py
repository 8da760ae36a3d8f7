"""What a hook's child tells the daemon, and the notices that came too late for the hook that asked.

Owns the gRPC calls of one hook event. Runs detached from the agent with a time limit of its own; every failure ends it
without a word.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import grpc

from ...daemon.api.v1 import sandbox_pb2, sandbox_pb2_grpc

LIMIT_S = 5
"""The child's own life."""
_CALL_TIMEOUT_S = 2.0
_BEGIN_MAY_TAKE_S = 1.0
"""The hook of the begin may still be under way when the end is told."""
_COMMAND_CHARACTERS = 4096


def tell(event: dict[str, object], socket: str, tenant: str, agent_pid: int | None, answer_to: int) -> None:
    """Tell the daemon about one hook event and write the notice, if there is one, to `answer_to`.

    `agent_pid` is wanted at SessionStart only.
    """
    signal.alarm(LIMIT_S)
    session = str(event.get("session_id", ""))
    notice = ""
    options = (("grpc.default_authority", "localhost"),)
    try:
        with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
            stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
            match event.get("hook_event_name"):
                case "SessionStart":
                    _register(stub, session, tenant, agent_pid)
                case "SessionEnd":
                    _remove(stub, session, tenant)
                case "PreToolUse":
                    _begin(stub, event, tenant)
                case "PostToolUse" | "PostToolUseFailure":
                    notice = "\n".join(line for line in (_take_late(session), _end(stub, event, tenant)) if line)
    except grpc.RpcError:
        return
    if not notice:
        return
    try:
        os.write(answer_to, notice.encode())
    except BrokenPipeError:
        _keep_late(session, notice)


def sandbox_of(session: str, tenant: str) -> tuple[str, str]:
    """(tenant, name): what `equipoise run` said, else the sandbox that SessionStart made for this session."""
    named = os.environ.get("EQUIPOISE_TENANT", ""), os.environ.get("EQUIPOISE_SANDBOX", "")
    if all(named):
        return named
    short = re.sub(r"[^A-Za-z0-9]", "", session)[:8]
    return (tenant, f"claude-{short}") if tenant and short else ("", "")


def external_id(event: dict[str, object]) -> str:
    """tool_use_id; versions without one are told apart by session and input."""
    if told := event.get("tool_use_id"):
        return str(told)
    what = f"{event.get('session_id')}\0{event.get('tool_name')}\0{event.get('tool_input')}"
    return "claude-" + hashlib.sha256(what.encode()).hexdigest()[:16]


def command_of(event: dict[str, object]) -> str:
    """What the tool call runs: the command of a shell tool, else the tool's name."""
    given = event.get("tool_input")
    command = given.get("command") if isinstance(given, dict) else None
    return str(command or event.get("tool_name") or "tool")[:_COMMAND_CHARACTERS]


def exit_code_of(event: dict[str, object]) -> int | None:
    """0 after PostToolUse, which only follows success; of a failure what its text says, None where it says nothing."""
    if event.get("hook_event_name") == "PostToolUse":
        return 0
    said = re.search(r"exit code (\d{1,3})", str(event.get("error", "")), re.IGNORECASE)
    return int(said[1]) if said else None


def _begin(stub: sandbox_pb2_grpc.SandboxServiceStub, event: dict[str, object], tenant: str) -> None:
    owner, name = sandbox_of(str(event.get("session_id", "")), tenant)
    if not name:
        return
    request = sandbox_pb2.BeginToolCallRequest(
        tenant_id=owner, name=name, command=command_of(event), external_id=external_id(event)
    )
    stub.BeginToolCall(request, timeout=_CALL_TIMEOUT_S)


def _end(stub: sandbox_pb2_grpc.SandboxServiceStub, event: dict[str, object], tenant: str) -> str:
    owner, name = sandbox_of(str(event.get("session_id", "")), tenant)
    request = sandbox_pb2.EndToolCallRequest(external_id=external_id(event), tenant_id=owner, name=name)
    if (code := exit_code_of(event)) is not None:
        request.exit_code = code
    give_up = time.monotonic() + _BEGIN_MAY_TAKE_S
    while True:
        try:
            return str(stub.EndToolCall(request, timeout=_CALL_TIMEOUT_S).notice)
        except grpc.RpcError as error:
            if _status_of(error) is not grpc.StatusCode.NOT_FOUND or time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def _status_of(error: Exception) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _register(stub: sandbox_pb2_grpc.SandboxServiceStub, session: str, tenant: str, agent_pid: int | None) -> None:
    """Give an agent that was not started by `equipoise run` a sandbox, if a tenant was named at installation."""
    owner, name = sandbox_of(session, tenant)
    if os.environ.get("EQUIPOISE_SANDBOX") or not name or agent_pid is None:
        return
    request = sandbox_pb2.RegisterSandboxRequest(tenant_id=owner, name=name, pid=agent_pid)
    stub.RegisterSandbox(request, timeout=_CALL_TIMEOUT_S)


def _remove(stub: sandbox_pb2_grpc.SandboxServiceStub, session: str, tenant: str) -> None:
    owner, name = sandbox_of(session, tenant)
    if name and not os.environ.get("EQUIPOISE_SANDBOX"):
        request = sandbox_pb2.RemoveSandboxRequest(tenant_id=owner, name=name)
        stub.RemoveSandbox(request, timeout=_CALL_TIMEOUT_S)


def _spool(session: str) -> Path:
    """Where late notices of a session are kept: a folder of this user alone. Raises OSError where it is not."""
    folder = Path(tempfile.gettempdir()) / f"equipoise-hooks-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder / hashlib.sha256(session.encode()).hexdigest()[:16]


def _keep_late(session: str, notice: str) -> None:
    try:
        with _spool(session).open("a") as file:
            file.write(notice + "\n")
    except OSError:
        return


def _take_late(session: str) -> str:
    try:
        kept = _spool(session)
        text = kept.read_text().strip()
        kept.unlink()
        return text
    except OSError:
        return ""
