"""What was decided, what came of it, and which tool calls have ended: recent memory for the servers.

Owns bounded lists in RAM, fed as a sink of the loop, and at the start from the journal, which is the long memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...policies.actions import Decision, Outcome, OutcomeStatus, SetTenantWeight
from ...policies.events import (
    DecisionMade,
    Event,
    OutcomeObserved,
    ProcessesGone,
    SandboxRegistered,
    ToolCallEnded,
    ToolCallWithdrawn,
)
from ...policies.model import CgroupId, DecisionId, Sandbox, SessionId, TenantId, ToolCall, ToolCallId
from ...policies.state import State

DECISIONS = 10_000
TOOL_CALLS = 10_000


@dataclass(slots=True)
class Told:
    """A decision and its newest outcome. An acceptance does not replace what came after it."""

    decision: Decision
    outcome: Outcome | None = None

    @property
    def tool_call(self) -> ToolCallId | None:
        return getattr(self.decision.action, "tool_call", None)

    @property
    def session(self) -> SessionId | None:
        return getattr(self.decision.action, "session", None)


class History:
    """Use as a sink: `history(event, state)`."""

    def __init__(self) -> None:
        self._decisions: OrderedDict[DecisionId, Told] = OrderedDict()
        self._ended: OrderedDict[ToolCallId, ToolCall] = OrderedDict()
        self.failed_action_count = 0
        self.sandbox_names: dict[CgroupId, str] = {}
        """Of sandboxes that are gone too: their tool calls are still listed."""

    def __call__(self, event: Event, state: State) -> None:
        match event:
            case SandboxRegistered(sandbox=sandbox):
                self.sandbox_names[sandbox.cgroup_id] = sandbox.name
            case DecisionMade(decision=decision):
                self._decisions[decision.id] = Told(decision)
                if len(self._decisions) > DECISIONS:
                    self._decisions.popitem(last=False)
            case OutcomeObserved(outcome=outcome):
                if told := self._decisions.get(outcome.decision):
                    told.outcome = outcome
                if outcome.status is OutcomeStatus.FAILED:
                    self.failed_action_count += 1
            case ToolCallEnded(id=ended) | ProcessesGone(id=ended):
                call = state.tool_calls.get(state.resolve(ended))
                if call is not None and call.end_ns is not None:
                    self._ended[call.id] = call
                    if len(self._ended) > TOOL_CALLS:
                        self._ended.popitem(last=False)
            case ToolCallWithdrawn(id=withdrawn):
                self._ended.pop(withdrawn, None)
            case _:
                pass

    def recall(
        self, calls: Iterable[ToolCall], decisions: Iterable[tuple[Decision, Outcome | None]], names: Iterable[Sandbox]
    ) -> None:
        """What earlier runs of this boot left in the journal; before the first event."""
        for call in sorted((c for c in calls if c.end_ns is not None), key=lambda c: c.end_ns or 0):
            self._ended[call.id] = call
        for decision, outcome in decisions:
            self._decisions[decision.id] = Told(decision, outcome)
        self.sandbox_names |= {sandbox.cgroup_id: sandbox.name for sandbox in names}

    def newest(self, limit: int) -> list[Told]:
        """Newest first, the bookkeeping of weights left out."""
        told = (t for t in reversed(self._decisions.values()) if not isinstance(t.decision.action, SetTenantWeight))
        return [t for t, _ in zip(told, range(limit), strict=False)]

    def find(
        self,
        limit: int,
        *,
        decision: DecisionId | None = None,
        tool_call: ToolCall | None = None,
        session: SessionId | None = None,
        tenant: TenantId | None = None,
    ) -> list[Told]:
        """Newest first; each given argument narrows down."""
        if tool_call is not None:
            return list(reversed(self.about(tool_call)))[:limit]
        found = (
            t
            for t in reversed(self._decisions.values())
            if (decision is None or t.decision.id == decision)
            and (session is None or t.session == session)
            and (tenant is None or t.decision.tenant == tenant)
        )
        return [t for t, _ in zip(found, range(limit), strict=False)]

    def about(self, call: ToolCall) -> list[Told]:
        """What was decided about a tool call, or about its session's KV while it ran; oldest first."""
        until_ns = call.end_ns
        return [
            t
            for t in self._decisions.values()
            if t.tool_call == call.id
            or (
                t.session == call.session
                and t.decision.at_ns >= call.start_ns
                and (until_ns is None or t.decision.at_ns <= until_ns)
            )
        ]

    def while_ran(self, call: ToolCall) -> list[Decision]:
        """Everything that was decided from its start to its end, newest first."""
        until_ns = call.end_ns if call.end_ns is not None else float("inf")
        made = (told.decision for told in reversed(self._decisions.values()))
        return [decision for decision in made if call.start_ns <= decision.at_ns <= until_ns]

    def ended(self) -> Iterator[ToolCall]:
        """Finished tool calls, in the order they ended."""
        return iter(self._ended.values())

    def ended_call(self, tool_call: ToolCallId) -> ToolCall | None:
        return self._ended.get(tool_call)
