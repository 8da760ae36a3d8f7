"""Running counts of what happened, for the metrics endpoint.

Owns counters only, fed as a sink of the loop and read from the endpoint's thread. Every label set is bounded: a kind,
rule or tenant beyond the first few dozen is counted as `other`, so that no agent can make the endpoint grow.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from ...policies.events import (
    BudgetLevel,
    BudgetReached,
    DecisionMade,
    Event,
    EventsLost,
    OutcomeObserved,
    ToolCallEnded,
)
from ...policies.model import NS_PER_S, DecisionId, ToolCallId
from ...policies.state import State

OTHER = "other"
KINDS = 32
RULES = 64
TENANTS = 64
_DECISIONS = 10_000
_ENDED = 10_000


@dataclass(slots=True)
class Counts:
    """Everything counted since the start."""

    tool_calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind and source, as they are known when a call has ended: until then a wrapper looks like a call of its own,
    and a call that a hook announced like one of lineage."""
    tool_calls_ended: Counter[str] = field(default_factory=Counter)
    """By tenant."""
    tool_call_seconds: Counter[str] = field(default_factory=Counter)
    """By tenant: their durations added up, cut to whole milliseconds and kept as such (divide by 1000)."""
    budget_stops: Counter[str] = field(default_factory=Counter)
    """By tenant."""
    decisions: Counter[str] = field(default_factory=Counter)
    """By rule."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """By status."""
    actions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By action, tenant and status of the outcome."""
    events_lost: Counter[str] = field(default_factory=Counter)
    """By source."""


class Tallies:
    """Use as a sink: `tallies(event, state)`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()
        self._labels: dict[str, set[str]] = {}
        self._decisions: OrderedDict[DecisionId, tuple[str, str]] = OrderedDict()
        self._ended: OrderedDict[ToolCallId, None] = OrderedDict()

    def __call__(self, event: Event, state: State) -> None:
        with self._lock:
            self._count(event, state)

    def read(self) -> Counts:
        """A copy, safe to keep."""
        with self._lock:
            c = self._counts
            return Counts(
                Counter(c.tool_calls),
                Counter(c.tool_calls_ended),
                Counter(c.tool_call_seconds),
                Counter(c.budget_stops),
                Counter(c.decisions),
                Counter(c.outcomes),
                Counter(c.actions),
                Counter(c.events_lost),
            )

    def _count(self, event: Event, state: State) -> None:
        counts = self._counts
        match event:
            case ToolCallEnded(id=tool_call):
                call = state.tool_calls.get(state.resolve(tool_call))
                if call is not None and call.end_ns is not None and self._first(call.id):
                    counts.tool_calls[self._bounded("kind", call.kind, KINDS), call.source.value] += 1
                    tenant = self._bounded("tenant", call.tenant, TENANTS)
                    counts.tool_calls_ended[tenant] += 1
                    counts.tool_call_seconds[tenant] += call.elapsed_ns(event.at_ns) * 1000 // NS_PER_S
            case BudgetReached(id=tool_call, level=BudgetLevel.HARD):
                call = state.tool_calls.get(state.resolve(tool_call))
                counts.budget_stops[self._bounded("tenant", call.tenant if call else OTHER, TENANTS)] += 1
            case DecisionMade(decision=decision):
                counts.decisions[self._bounded("rule", decision.rule, RULES)] += 1
                self._decisions[decision.id] = (
                    type(decision.action).__name__.lower(),
                    self._bounded("tenant", decision.tenant, TENANTS),
                )
                if len(self._decisions) > _DECISIONS:
                    self._decisions.popitem(last=False)
            case OutcomeObserved(outcome=outcome):
                counts.outcomes[outcome.status.value] += 1
                action, tenant = self._decisions.get(outcome.decision, (OTHER, OTHER))
                counts.actions[action, tenant, outcome.status.value] += 1
            case EventsLost(source=source, count=count):
                counts.events_lost[self._bounded("source", source, KINDS)] += count
            case _:
                pass

    def _first(self, call: ToolCallId) -> bool:
        """Whether it ends for the first time: its wrapper, its hook and the kernel each say so."""
        if call in self._ended:
            return False
        self._ended[call] = None
        if len(self._ended) > _ENDED:
            self._ended.popitem(last=False)
        return True

    def _bounded(self, label: str, value: str, limit: int) -> str:
        known = self._labels.setdefault(label, set())
        if value not in known and len(known) >= limit:
            return OTHER
        known.add(value)
        return value
