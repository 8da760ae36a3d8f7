"""The commands' side of the gRPC API: where the socket is, how to say that nobody answers.

Owns `equipoise run` and `equipoise tool` as processes: what they register, fork and exec.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from ...policies.estimate import command_kind
from ..api.v1 import policy_pb2, policy_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from ..errors import CommandError

SOCKET_NAME = "equipoise.sock"
TIMEOUT_S = 10.0
EXIT_NOT_FOUND = 127
OPENAI_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
"""Where OpenAI's libraries, and those that go by the older name, find the engine. Set already: it stays."""


def default_state_dir() -> Path:
    """/run/equipoise for root, else under XDG_RUNTIME_DIR (or a private folder in the home)."""
    if os.geteuid() == 0:
        return Path("/run/equipoise")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "equipoise" if runtime else Path.home() / ".local/state/equipoise"


def default_socket() -> str:
    return os.environ.get("EQUIPOISE_SOCKET") or str(default_state_dir() / SOCKET_NAME)


def add_socket_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        default=default_socket(),
        metavar="PATH",
        help="the daemon's socket (default: $EQUIPOISE_SOCKET, else %(default)s)",
    )


@contextlib.contextmanager
def channel(socket: str) -> Iterator[grpc.Channel]:
    """A channel to the daemon. Every failure of a call inside becomes one CommandError."""
    path = socket.removeprefix("unix:")
    try:
        Path(path).stat()
    except PermissionError as error:
        raise CommandError(f"{path}: permission denied: run as root, or give --socket") from error
    except OSError as error:
        raise CommandError(f"no daemon at {path}: start one with `equipoise daemon`, or give --socket") from error
    with grpc.insecure_channel(f"unix:{path}", options=[("grpc.default_authority", "localhost")]) as opened:
        try:
            yield opened
        except grpc.RpcError as error:
            raise CommandError(_reason(error, path)) from error


def _reason(error: Any, path: str) -> str:
    """What a failed call means. gRPC's errors are calls as well, which its types cannot say."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if not os.access(path, os.R_OK | os.W_OK):
            return f"{path}: permission denied: run as root, or as a member of the socket's group"
        return f"the daemon at {path} does not answer: is it running? `equipoise release` undoes what a dead one left"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the daemon at {path} did not answer within {TIMEOUT_S:g} s"
    return str(error.details() or error.code().name)


def status(socket: str) -> policy_pb2.GetStatusResponse:
    with channel(socket) as opened:
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        answered: policy_pb2.GetStatusResponse = stub.GetStatus(policy_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        return answered


def list_tool_calls(socket: str, tenant: str = "") -> list[policy_pb2.ToolCallView]:
    """Oldest first. Raises CommandError."""
    with channel(socket) as opened:
        request = policy_pb2.ListToolCallsRequest(tenant_id=tenant, limit=10_000)
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        return list(stub.ListToolCalls(request, timeout=TIMEOUT_S).tool_calls)


def list_sessions(socket: str, tenant: str = "") -> list[policy_pb2.SessionView]:
    """The engines' conversations, by id. Raises CommandError."""
    with channel(socket) as opened:
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        (picture,) = stub.Watch(policy_pb2.WatchRequest(once=True), timeout=TIMEOUT_S)
        return [session for session in picture.sessions if tenant in ("", session.tenant_id)]


def list_processes(socket: str, tenant: str = "") -> list[policy_pb2.ProcessView]:
    """What runs below the agents and is no tool call. Raises CommandError."""
    with channel(socket) as opened:
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        (picture,) = stub.Watch(policy_pb2.WatchRequest(once=True), timeout=TIMEOUT_S)
        return [process for process in picture.processes if tenant in ("", process.tenant_id)]


def explain(
    socket: str, tool_call: str = "", session: str = "", tenant: str = "", limit: int = 20, decision: str = ""
) -> list[policy_pb2.DecisionView]:
    """Newest first. Raises CommandError."""
    with channel(socket) as opened:
        request = policy_pb2.ExplainRequest(
            tool_call_id=tool_call, session_id=session, tenant_id=tenant, limit=limit, decision_id=decision
        )
        return list(policy_pb2_grpc.PolicyServiceStub(opened).Explain(request, timeout=TIMEOUT_S).decisions)


def why_not(socket: str, which: str) -> policy_pb2.WhyNotResponse:
    """Of a tool call or a session by its id. Raises CommandError."""
    with channel(socket) as opened:
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        answered: policy_pb2.WhyNotResponse = stub.WhyNot(policy_pb2.WhyNotRequest(id=which), timeout=TIMEOUT_S)
        return answered


def get_policy(socket: str) -> policy_pb2.GetPolicyResponse:
    """What the daemon has in force. Raises CommandError."""
    with channel(socket) as opened:
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        answered: policy_pb2.GetPolicyResponse = stub.GetPolicy(policy_pb2.GetPolicyRequest(), timeout=TIMEOUT_S)
        return answered


def apply_policy(socket: str, texts: list[tuple[str, str]], *, only_check: bool) -> policy_pb2.ApplyPolicyResponse:
    """`texts`: name and text of each layer; none: the daemon's own files. Raises CommandError: a line a problem."""
    with channel(socket) as opened:
        request = policy_pb2.ApplyPolicyRequest(
            texts=[policy_pb2.PolicyText(name=name, text=text) for name, text in texts], only_check=only_check
        )
        stub = policy_pb2_grpc.PolicyServiceStub(opened)
        answered: policy_pb2.ApplyPolicyResponse = stub.ApplyPolicy(request, timeout=TIMEOUT_S)
        return answered


def release(opened: grpc.Channel) -> list[str]:
    """Ask a living daemon to undo everything; what it undid, one line each."""
    answered = policy_pb2_grpc.PolicyServiceStub(opened).Release(policy_pb2.ReleaseRequest(), timeout=TIMEOUT_S)
    return list(answered.released)


def run_agent(
    socket: str, tenant: str, name: str, session: str | None, command: list[str], *, direct: bool = False
) -> int:
    """Become an agent: register this process, then exec the command in its place. Returns only on failure."""
    with channel(socket) as opened:
        registered = sandbox_pb2_grpc.SandboxServiceStub(opened).RegisterSandbox(
            sandbox_pb2.RegisterSandboxRequest(
                tenant_id=tenant, name=name, pid=os.getpid(), session_id=session or "", direct=direct
            ),
            timeout=TIMEOUT_S,
        )
        answered = policy_pb2_grpc.PolicyServiceStub(opened).GetStatus(policy_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    environment = os.environ | {
        "EQUIPOISE_SOCKET": socket,
        "EQUIPOISE_TENANT": tenant,
        "EQUIPOISE_SANDBOX": name,
        "EQUIPOISE_SESSION": registered.session_id,
    }
    if answered.engine_url.startswith("http"):
        environment["EQUIPOISE_ENGINE_URL"] = answered.engine_url
        for variable in OPENAI_VARIABLES:
            environment.setdefault(variable, f"{answered.engine_url}/v1")
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise CommandError(f"{command[0]}: {error.strerror}") from error


def run_tool(socket: str, tenant: str, name: str, command: list[str], expect_bytes: int) -> int:
    """Run one tool call and answer its exit code; what was done to it goes to standard error.

    The child waits at a pipe until the daemon follows it, so that not a page of it is missed. Where the daemon does
    not answer the command runs all the same, unmeasured: an agent must not fail because we do.
    """
    if shutil.which(command[0]) is None:
        print(f"equipoise: {command[0]}: no such command, or not executable", file=sys.stderr)
        return EXIT_NOT_FOUND
    ready_read, ready_write = os.pipe()
    child = subprocess.Popen(["/bin/sh", "-c", _wait_and_exec(ready_read), "sh", *command], pass_fds=(ready_read,))
    os.close(ready_read)
    _pass_signals_on(child)
    call = ""
    line = subprocess.list2cmdline(command)
    try:
        with channel(socket) as opened:
            stub = sandbox_pb2_grpc.SandboxServiceStub(opened)
            if expect_bytes and tenant and name:
                stub.DeclareIntent(
                    sandbox_pb2.DeclareIntentRequest(
                        tenant_id=tenant, name=name, kind=command_kind(line), expected_bytes=expect_bytes
                    ),
                    timeout=TIMEOUT_S,
                )
            begun = stub.BeginToolCall(
                sandbox_pb2.BeginToolCallRequest(
                    tenant_id=tenant,
                    name=name,
                    command=line,
                    pid=child.pid,
                    wrapper_pid=os.getpid(),
                ),
                timeout=TIMEOUT_S,
            )
            call = begun.tool_call_id
    except CommandError as error:
        print(f"equipoise: this tool call is not measured: {error}", file=sys.stderr)
    finally:
        os.write(ready_write, b"\n")
        os.close(ready_write)
    code = child.wait()
    if call:
        _report_end(socket, call, code)
    return 128 - code if code < 0 else code


def _wait_and_exec(fd: int) -> str:
    """For the shell: what it holds before the exec counts towards the call, and it holds less than Python does."""
    close = f"{fd}<&-" if fd < 10 else ""  # dash knows no more than one digit; a read end left open does no harm
    return f'read -r _ </dev/fd/{fd}; exec "$@" {close}'


def _pass_signals_on(child: subprocess.Popen[bytes]) -> None:
    """By a thread that waits for them. A handler runs between two instructions of Python: of a signal that comes just
    before `wait()` has begun to wait it would hear when the child has ended."""
    passed = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed)

    def pass_on() -> None:
        while True:
            child.send_signal(signal.sigwait(passed))

    threading.Thread(target=pass_on, name="signals", daemon=True).start()


def _report_end(socket: str, call: str, code: int) -> None:
    try:
        with channel(socket) as opened:
            ended = sandbox_pb2_grpc.SandboxServiceStub(opened).EndToolCall(
                sandbox_pb2.EndToolCallRequest(
                    tool_call_id=call, exit_code=code if code >= 0 else None, signal=max(0, -code)
                ),
                timeout=TIMEOUT_S,
            )
    except CommandError:
        return  # the daemon went away meanwhile; the command's own result stands
    if ended.notice:
        print(ended.notice, file=sys.stderr)
