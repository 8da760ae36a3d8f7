"""PolicyService: the state as messages, and release. Reading changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc

from ...policies.model import DecisionId, Session, SessionId, TenantId, ToolCall, ToolCallId
from ...policies.whynot import Look, budget_looks, last_weighed, passed_over, why_not_call, why_not_session
from .. import log
from ..api.v1 import policy_pb2 as pb
from ..api.v1 import policy_pb2_grpc
from ..errors import JournalError
from ..loop import Loop
from ..observe import archive
from ..observe.history import History, Told
from ..policy import PolicyError, PolicyKeeper, Text, dump
from . import views, words

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in the stubs only
T = TypeVar("T")
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
    journal: Path | None
    """Where what is no longer remembered is looked for."""
    settle: Callable[[], None]
    """Take in what waits: what was put in force is, then."""


class PolicyServer(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(
        self,
        loop: Loop,
        history: History,
        effects: Effects,
        now_ns: Callable[[], int] = time.monotonic_ns,
        unix_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._loop = loop
        self._history = history
        self._effects = effects
        self._unix_offset_ns = unix_ns() - now_ns()
        """Of this boot. Taken once, so that a decision was always made at the same time of day."""

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
        """From memory first; where that has fewer than asked for, from the journal too."""
        limit = max(1, min(request.limit or LIMIT, MOST))
        call, call_id = await self._asked_call(request.tool_call_id, context)
        found = []
        if call is not None or not request.tool_call_id:
            found = self._history.find(
                limit,
                decision=DecisionId(request.decision_id) if request.decision_id else None,
                tool_call=call,
                session=SessionId(request.session_id) if request.session_id else None,
                tenant=TenantId(request.tenant_id) if request.tenant_id else None,
            )
        made = [views.decision_view(told, self._unix_offset_ns) for told in found]
        if len(made) < limit:
            made += await self._from_journal(request, call_id, limit, {view.decision_id for view in made})
        return pb.ExplainResponse(decisions=made[:limit])

    async def _asked_call(self, text: str, context: Context) -> tuple[ToolCall | None, ToolCallId | None]:
        """The call that is meant, where it is remembered, and its id, where anybody knows it."""
        if not text:
            return None, None
        meant = self._meant(text)
        ids = [call.id for call in meant] or await self._ask_journal(archive.calls_ending, text)
        if not ids:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no tool call {text}: `equipoise ps --all` lists them")
        if len(ids) > 1:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(ids)} tool calls are called {text}...: give more of the id, or its end",
            )
        return next(iter(meant), None), ids[0]

    async def _from_journal(
        self, request: pb.ExplainRequest, call: ToolCallId | None, limit: int, known: set[str]
    ) -> list[pb.DecisionView]:
        past = await self._ask_journal(
            archive.find,
            limit + len(known),
            decision=request.decision_id,
            tool_call=call,
            session=request.session_id,
            tenant=request.tenant_id,
        )
        return [
            views.decision_view(Told(each.decision, each.outcome), each.at_unix_ns - each.decision.at_ns)
            for each in past
            if each.decision.id not in known
        ]

    async def _ask_journal(self, ask: Callable[..., list[T]], *what: object, **narrow: object) -> list[T]:
        """Beside the loop, since a disk may take its time; nothing where the journal can not be read."""
        if self._effects.journal is None:
            return []
        try:
            return await asyncio.to_thread(ask, self._effects.journal, *what, **narrow)
        except JournalError as error:
            log.warning("journal_not_read", error=error)
            return []

    async def WhyNot(self, request: pb.WhyNotRequest, context: Context) -> pb.WhyNotResponse:
        if not request.id:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "why not what? give the id of a tool call or a session"
            )
        snapshot, policy = self._loop.snapshot, self._loop.state.policy
        session = next((s for s in snapshot.sessions if s.id == request.id), None)
        if session is not None:
            subject = f"session {session.id}, {session.phase.value}, KV {session.tier.value}"
            return views.why_not_response(subject, self._why_not_session(session))
        call, call_id = await self._asked_call(request.id, context)
        if call is None:
            return await self._why_not_then(call_id, context)
        looks = why_not_call(snapshot, policy, call) + passed_over(call, self._history.while_ran(call))
        session = next((s for s in snapshot.sessions if s.id == call.session), None)
        if session is not None and call.running:
            looks += self._why_not_session(session)
        return views.why_not_response(views.call_words(call, snapshot), looks)

    def _why_not_session(self, session: Session) -> tuple[Look, ...]:
        snapshot, about = self._loop.snapshot, self._history.find(LIMIT, session=session.id)
        looks = why_not_session(snapshot, self._loop.state.policy, session)
        return looks + last_weighed((told.decision for told in about), snapshot.now_ns)

    async def _why_not_then(self, call_id: ToolCallId | None, context: Context) -> pb.WhyNotResponse:
        """Of a call that only the journal knows: what its run passed over."""
        found = await self._ask_journal(archive.call_and_time, call_id)
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the journal knows its id and no more of it")
        (call, decisions) = found[0]
        snapshot = self._loop.snapshot
        looks = (*budget_looks(self._loop.state.policy, call), *passed_over(call, decisions))
        return views.why_not_response(f"{views.call_words(call, snapshot)}, of an earlier run", looks)

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
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _shortened(error.lines))
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


_DETAILS_CHARACTERS = 4000
"""gRPC carries an error's words in a header, of which a client takes 8 KiB."""


def _shortened(lines: list[str]) -> str:
    """As many lines as fit, and how many more there are."""
    kept: list[str] = []
    for line in lines:
        if sum(map(len, kept)) + len(line) > _DETAILS_CHARACTERS:
            return "\n".join([*kept, f"and {len(lines) - len(kept)} more: `equipoise policy check` has them all"])
        kept.append(line)
    return "\n".join(kept)
