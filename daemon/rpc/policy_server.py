"""PolicyService: the state as messages, and release. Reading changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from ...policies.model import DecisionId, SessionId, TenantId, ToolCall, ToolCallId
from ..api.v1 import policy_pb2 as pb
from ..api.v1 import policy_pb2_grpc
from ..loop import Loop
from ..observe.history import History
from ..policy import PolicyError, PolicyKeeper, Text, dump
from . import views, words

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in the stubs only
INTERVAL_MS = 1000
LIMIT = 50
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Effects:
    """What the server needs of the rest of the daemon."""

    status: Callable[[], pb.GetStatusResponse]
    release: Callable[[], list[str]]
    """Undo everything that holds something back; answers what was undone."""
    policy: PolicyKeeper
    settle: Callable[[], None]
    """Take in what waits: what was put in force is, then."""


class PolicyServer(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(self, loop: Loop, history: History, effects: Effects) -> None:
        self._loop = loop
        self._history = history
        self._effects = effects

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        interval_ms = request.interval_ms or INTERVAL_MS
        if not 100 <= interval_ms <= 60_000:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"interval_ms {interval_ms}: use 100 to 60000")
        while True:
            yield views.watch_response(self._loop.snapshot, self._loop.state.policy, self._history, self._loop.would_be)
            if request.once:
                return
            await asyncio.sleep(interval_ms / 1000)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        call = None
        if request.tool_call_id:
            meant = self._meant(request.tool_call_id)
            if not meant:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND, f"no tool call {request.tool_call_id}: `equipoise ps --all` lists them"
                )
            if len(meant) > 1:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"{len(meant)} tool calls are called {request.tool_call_id}...: give more of the id, or its end",
                )
            call = meant[0]
        found = self._history.find(
            max(1, min(request.limit or LIMIT, MOST)),
            decision=DecisionId(request.decision_id) if request.decision_id else None,
            tool_call=call,
            session=SessionId(request.session_id) if request.session_id else None,
            tenant=TenantId(request.tenant_id) if request.tenant_id else None,
        )
        return pb.ExplainResponse(decisions=[views.decision_view(told) for told in found])

    async def ListToolCalls(self, request: pb.ListToolCallsRequest, context: Context) -> pb.ListToolCallsResponse:
        state = self._loop.state
        calls = {c.id: c for c in self._history.ended()} | state.tool_calls
        chosen = [c for c in calls.values() if not request.tenant_id or c.tenant == request.tenant_id]
        chosen.sort(key=lambda c: c.start_ns)
        names = {s.cgroup_id: s.name for s in state.sandboxes.values()} | self._history.sandbox_names
        limit = max(1, min(request.limit or 1000, MOST))
        return pb.ListToolCallsResponse(
            tool_calls=[views.tool_call_view(c, names, self._history, self._loop.would_be(c)) for c in chosen[-limit:]]
        )

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        return self._effects.status()

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        now = self._effects.policy.in_force
        return pb.GetPolicyResponse(
            document=dump(now.policy), layers=now.layers, applied_ns=now.applied_ns, refused=now.refused
        )

    async def ApplyPolicy(self, request: pb.ApplyPolicyRequest, context: Context) -> pb.ApplyPolicyResponse:
        keeper, texts = self._effects.policy, [Text(each.name, each.text) for each in request.texts]
        if request.only_check and not texts:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "only_check without texts: nothing to check")
        try:
            changed = keeper.apply(texts, only_check=request.only_check) if texts else keeper.reload("asked for by rpc")
        except PolicyError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        self._effects.settle()
        return pb.ApplyPolicyResponse(changes=changed, policy_name=keeper.in_force.policy.name)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(released=self._effects.release())

    def _meant(self, text: str) -> list[ToolCall]:
        """By the whole id, or by its beginning or end: the ids of one run begin alike."""
        calls = {c.id: c for c in self._history.ended()} | self._loop.state.tool_calls
        try:
            resolved = self._loop.state.resolve(ToolCallId(int(text, 16)))
        except ValueError:
            return []
        if resolved in calls:
            return [calls[resolved]]
        return [c for c in calls.values() if words.tool_call_hex(c.id).startswith(text.lower())] or [
            c for c in calls.values() if words.tool_call_hex(c.id).endswith(text.lower())
        ]
