"""A dry run: what budgets would have stopped, and what would have come of each decision, while nothing is done.

Owns a State of its own, in which calls have the budgets that the policy gives them, stand when they reach one, and are
slowed down, granted more or ended as decided. It lives on the events of the real one; nothing of it leads back there. A
call that would stand goes on in truth: what it has used meanwhile counts from the moment it would have been let go on,
so that its would-be peaks are the real ones, at the wrong time.
"""

from __future__ import annotations

import copy

from ..policies.actions import (
    Decision,
    Freeze,
    Grant,
    Kill,
    Outcome,
    OutcomeStatus,
    Thaw,
    Throttle,
    ToolCallAction,
)
from ..policies.events import (
    BudgetChanged,
    BudgetLevel,
    BudgetReached,
    Event,
    OutcomeObserved,
    PolicyApplied,
    ProcessesGone,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from ..policies.memory.grants import first_budget
from ..policies.model import ToolCall, ToolCallId, ToolCallPhase
from ..policies.snapshot import Snapshot
from ..policies.state import State

TIER = "none"


class Rehearsal:
    """Invariant: no call in it uses more than its budget, unless it has none."""

    def __init__(self, state: State) -> None:
        """From what is known now; the real `state` is left as it is."""
        self.state = copy.deepcopy(state)
        self._held: dict[ToolCallId, ToolCallMemoryStepped] = {}
        """Of calls that would stand: what they have come to in truth."""
        self._killed: set[ToolCallId] = set()
        self._expires: dict[ToolCallId, tuple[int, Decision]] = {}
        self._give_budgets(state.host.observed_ns)

    def take_in(self, event: Event) -> None:
        """An event of the real host."""
        if isinstance(event, ToolCallStarted):
            self.state.apply(event)
            if call := self.state.tool_calls.get(event.id):
                self._give_budget(call, event.at_ns)
        elif isinstance(event, BudgetChanged | BudgetReached):
            pass  # the kernel's, which has none
        elif isinstance(event, ToolCallMemoryStepped):
            self._stepped(event)
        elif isinstance(event, ToolCallEnded | ProcessesGone) and self.state.resolve(event.id) in self._killed:
            if isinstance(event, ProcessesGone):
                self._killed.discard(self.state.resolve(event.id))
        else:
            self.state.apply(event)
            if isinstance(event, PolicyApplied):
                self._give_budgets(event.at_ns)
            elif isinstance(event, ProcessesGone):
                self._held.pop(self.state.resolve(event.id), None)

    def snapshot(self, now_ns: int) -> Snapshot:
        """What is to be decided on."""
        for call, (expires_ns, decision) in list(self._expires.items()):
            if expires_ns <= now_ns:
                del self._expires[call]
                self._came(decision, OutcomeStatus.EXPIRED, now_ns)
        return self.state.snapshot(now_ns)

    def carry_out(self, decision: Decision, now_ns: int) -> None:
        """As if it had been done, as far as it is about a call: what an engine would have made of it is not known."""
        action = decision.action
        if not isinstance(action, ToolCallAction):
            return
        call = self.state.resolve(action.tool_call)
        match action:
            case Throttle(expires_ns=expires_ns) | Freeze(expires_ns=expires_ns):
                self._expires[call] = (expires_ns, decision)
            case Thaw() | Kill():
                self._expires.pop(call, None)
            case _:
                pass
        if isinstance(action, Grant | Kill | Thaw | Throttle | Freeze):
            self._came(decision, OutcomeStatus.COMPLETED, now_ns)
        if isinstance(action, Grant) and (held := self._held.pop(call, None)):
            self._stepped(held)
        if isinstance(action, Kill):
            self._killed.add(call)
            self._held.pop(call, None)
            self.state.apply(ToolCallEnded(now_ns, call, None, None))
            self.state.apply(ProcessesGone(now_ns, call))

    def would_be(self, call: ToolCall) -> str:
        """What a call would be, where that is something else than it is: "stopped", "throttled", "ended"."""
        if call.id in self._killed:
            return ToolCallPhase.ENDED.value
        there = self.state.tool_calls.get(call.id)
        return there.phase.value if there is not None and there.phase is not call.phase else ""

    def _stepped(self, event: ToolCallMemoryStepped) -> None:
        call = self.state.tool_calls.get(self.state.resolve(event.id))
        if call is None or call.id in self._killed:
            return
        if call.stopped_ns is not None:
            self._held[call.id] = event
        elif call.hard_bytes and event.used_bytes >= call.hard_bytes and not call.exempt:
            self._held[call.id] = event
            level, hard = BudgetLevel.HARD, call.hard_bytes
            self.state.apply(BudgetReached(event.at_ns, call.id, level, hard, hard, call.pid or 0))
        else:
            self.state.apply(event)

    def _give_budgets(self, at_ns: int) -> None:
        for call in [c for c in self.state.tool_calls.values() if c.running and c.granted_ns is None]:
            self._give_budget(call, at_ns)

    def _give_budget(self, call: ToolCall, at_ns: int) -> None:
        if call.exempt:
            return
        policy = self.state.policy
        pool = policy.memory.pool_bytes(self.state.host.memory_total_bytes)
        sharers = sum(c.running and not c.exempt for c in self.state.tool_calls.values())  # itself among them
        budget = first_budget(call, policy, pool, sharers)
        self.state.apply(BudgetChanged(at_ns, call.id, budget.soft_bytes, budget.hard_bytes))

    def _came(self, decision: Decision, status: OutcomeStatus, at_ns: int) -> None:
        self.state.apply(OutcomeObserved(at_ns, Outcome(decision.id, status, at_ns, TIER)))
