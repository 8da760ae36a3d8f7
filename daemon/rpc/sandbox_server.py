"""SandboxService over the keepers. Owns the checking of requests; every refusal is one line with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from ...ebpf.errors import EbpfError
from ...policies.actions import Freeze, Grant, Kill, OutcomeStatus, Throttle, Wait
from ...policies.events import Event, IntentDeclared
from ...policies.model import MIB, NS_PER_S, Sandbox, SessionId, TenantId, ToolCall, ToolCallId, tenants_session
from ...policies.state import State
from ..api.v1 import sandbox_pb2 as pb
from ..api.v1 import sandbox_pb2_grpc
from ..errors import CgroupError, Refusal, RegistrationRefused
from ..observe.history import History
from ..sandboxes.keeper import SandboxKeeper
from ..sandboxes.tool_calls import ToolCallKeeper
from .words import tool_call_hex

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in the stubs only
STATUS = {
    Refusal.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Refusal.TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Refusal.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
}


class SandboxServer(sandbox_pb2_grpc.SandboxServiceServicer):
    """`settle` takes in everything that waits (probes and queue) and runs one turn of the loop."""

    def __init__(
        self,
        sandboxes: SandboxKeeper,
        calls: ToolCallKeeper,
        state: State,
        history: History,
        emit: Callable[[Event], None],
        settle: Callable[[], None],
        now_ns: Callable[[], int],
    ) -> None:
        self._sandboxes = sandboxes
        self._calls = calls
        self._state = state
        self._history = history
        self._emit = emit
        self._settle = settle
        self._now_ns = now_ns

    async def RegisterSandbox(self, request: pb.RegisterSandboxRequest, context: Context) -> pb.RegisterSandboxResponse:
        known = [t.id for t in self._state.policy.tenants]
        if request.tenant_id not in known:
            await _refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"unknown tenant {request.tenant_id!r}: policy {self._state.policy.name} knows {', '.join(known)}; "
                "add it under spec.tenants",
            )
        try:
            sandbox = self._sandboxes.register(
                TenantId(request.tenant_id),
                request.name,
                request.pid or None,
                request.cgroup_path or None,
                tenants_session(TenantId(request.tenant_id), request.session_id) if request.session_id else None,
                direct=request.direct,
            )
        except RegistrationRefused as error:
            await _refuse(context, STATUS[error.reason], str(error))
        except ProcessLookupError:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"no process {request.pid}")
        except (CgroupError, EbpfError) as error:
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self._settle()
        return pb.RegisterSandboxResponse(
            cgroup_id=sandbox.cgroup_id, cgroup_path=sandbox.path, session_id=sandbox.session
        )

    async def RemoveSandbox(self, request: pb.RemoveSandboxRequest, context: Context) -> pb.RemoveSandboxResponse:
        sandbox = await self._sandbox(request.tenant_id, request.name, 0, context)
        if problem := self._sandboxes.remove(sandbox.cgroup_id):
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"forgotten, but its cgroup stays: {problem}")
        self._settle()
        return pb.RemoveSandboxResponse()

    async def BeginToolCall(self, request: pb.BeginToolCallRequest, context: Context) -> pb.BeginToolCallResponse:
        self._settle()  # the kernel may have seen the process already
        sandbox = await self._sandbox(request.tenant_id, request.name, request.wrapper_pid or request.pid, context)
        try:
            call = self._calls.begin(
                sandbox,
                request.command,
                request.pid or None,
                request.wrapper_pid or None,
                request.external_id or None,
                self._session(sandbox, request.session_id),
            )
        except RegistrationRefused as error:
            await _refuse(context, STATUS[error.reason], str(error))
        except ProcessLookupError:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"no process {request.pid}")
        except (CgroupError, EbpfError) as error:
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self._settle()
        known = self._state.tool_calls.get(self._state.resolve(call)) if call is not None else None
        return pb.BeginToolCallResponse(
            tool_call_id=tool_call_hex(call) if call is not None else "",
            soft_bytes=known.soft_bytes if known else 0,
            hard_bytes=known.hard_bytes if known else 0,
        )

    async def EndToolCall(self, request: pb.EndToolCallRequest, context: Context) -> pb.EndToolCallResponse:
        call = await self._call_id(request, context)
        self._settle()
        exit_code = request.exit_code if request.HasField("exit_code") and not request.signal else None
        self._calls.end(call, exit_code, request.signal or None)
        self._settle()
        known = self._known(self._calls.resolve(call))
        if known is None:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, f"unknown tool call {tool_call_hex(call)}")
        return pb.EndToolCallResponse(
            tool_call_id=tool_call_hex(known.id),
            peak_bytes=known.peak_bytes,
            duration_ns=known.elapsed_ns(self._now_ns()),
            stalled_ns=known.stalled_ns,
            notice=notice(known, self._history),
        )

    async def DeclareIntent(self, request: pb.DeclareIntentRequest, context: Context) -> pb.DeclareIntentResponse:
        sandbox = await self._sandbox(request.tenant_id, request.name, 0, context)
        if not request.kind or request.expected_bytes < 0 or request.expected_ns < 0:
            await _refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "an intent needs a kind (`pytest`), and bytes and time that are not negative",
            )
        self._emit(
            IntentDeclared(
                self._now_ns(),
                sandbox.cgroup_id,
                request.kind,
                request.expected_bytes or None,
                request.expected_ns or None,
            )
        )
        return pb.DeclareIntentResponse()

    async def _sandbox(self, tenant: str, name: str, pid: int, context: Context) -> Sandbox:
        if tenant or name:
            sandbox = self._sandboxes.find(tenant, name)
            what = f"{tenant}/{name}"
        else:
            sandbox = self._sandboxes.find_by_pid(pid) if pid else None
            what = f"with process {pid}"
        if sandbox is None:
            await _refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no sandbox {what}: start the agent with `equipoise run --tenant T --name N -- CMD`",
            )
        return sandbox

    def _session(self, sandbox: Sandbox, named: str) -> SessionId | None:
        """The conversation that a hook means; None: it names none.

        One of its tenant that an engine (which knows no clients) has under that very name, else its tenant's.
        """
        if not named:
            return None
        shown = self._state.sessions.get(SessionId(named))
        return SessionId(named) if shown and shown.tenant == sandbox.tenant else tenants_session(sandbox.tenant, named)

    def _known(self, call: ToolCallId) -> ToolCall | None:
        """One that runs, or that has ended lately."""
        return self._state.tool_calls.get(call) or self._history.ended_call(call)

    async def _call_id(self, request: pb.EndToolCallRequest, context: Context) -> ToolCallId:
        """The call that is meant: of the sandbox that the request names, where it names one."""
        named = request.tenant_id or request.name
        sandbox = await self._sandbox(request.tenant_id, request.name, 0, context) if named else None
        if not request.tool_call_id:
            return await self._external_call(request.external_id, sandbox, context)
        try:
            call = ToolCallId(int(request.tool_call_id, 16))
        except ValueError:
            what = f"tool call id {request.tool_call_id!r} is not 16 hex digits"
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, what)
        known = self._known(self._calls.resolve(call))
        if sandbox is not None and known is not None and known.sandbox != sandbox.cgroup_id:
            what = f"{sandbox.label} has no tool call {request.tool_call_id}"
            await _refuse(context, grpc.StatusCode.NOT_FOUND, what)
        return call

    async def _external_call(self, external: str, sandbox: Sandbox | None, context: Context) -> ToolCallId:
        found = self._calls.external_calls(external) if external else {}
        if sandbox is not None:
            found = {at: call for at, call in found.items() if at == sandbox.cgroup_id}
        if not found:
            where = f" by {sandbox.label}" if sandbox is not None else ""
            what = f"no tool call was begun as {external or 'nothing'!r}{where}"
            await _refuse(context, grpc.StatusCode.NOT_FOUND, what)
        if len(found) > 1:
            what = f"{len(found)} sandboxes have begun a tool call as {external!r}: say which by tenant_id and name"
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, what)
        return next(iter(found.values()))


def notice(call: ToolCall, history: History) -> str:
    """One line for the agent about what was done to its call; empty where nothing was."""
    parts = []
    for told in history.about(call):
        done = told.outcome is not None and told.outcome.status is OutcomeStatus.COMPLETED
        expired = told.outcome is not None and told.outcome.status is OutcomeStatus.EXPIRED  # it was done, and is over
        match told.decision.action:
            case Kill(message=message) if done:
                return message
            case Wait() if done:
                parts.append("waited for memory at its budget")
            case Grant(hard_bytes=hard) if done:
                parts.append(f"was granted up to {hard / MIB:.0f} MiB")
            case Throttle() if done or expired:
                parts.append("was slowed down because memory was short")
            case Freeze() if done or expired:
                parts.append("was frozen for a while because memory was short")
            case _:
                pass
    if not parts:
        return ""
    stalled = f", {call.stalled_ns / NS_PER_S:.1f} s stalled" if call.stalled_ns else ""
    done_to_it = "; ".join(dict.fromkeys(parts))
    return f"Equipoise: this tool call peaked at {call.peak_bytes / MIB:.0f} MiB{stalled}; it {done_to_it}."


async def _refuse(context: Context, code: grpc.StatusCode, detail: str) -> NoReturn:
    await context.abort(code, detail)
    raise AssertionError("abort raises")
