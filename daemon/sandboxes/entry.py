"""What a tool call may use before it is asked about, as the kernel holds it for each parent of calls.

Owns who has such a budget for its children, and bringing it up to date as calls come and go: in a small pool many
together begin with less (policies/memory/grants.py says how much). Stops nobody.
"""

from __future__ import annotations

from ...ebpf.tool_memory import ToolMemory
from ...policies.memory.grants import entry_budget, first_budget
from ...policies.model import ToolCall, ToolCallId
from ...policies.policy import Budget
from ...policies.state import State

NOTHING = (0, 0)


class EntryBudgets:
    """Amounts are (soft, hard) in bytes; 0: none."""

    def __init__(self, probes: ToolMemory | None, state: State) -> None:
        self._probes = probes
        self._state = state
        self._parents: set[ToolCallId] = set()
        self._sharers = 1
        self._told = NOTHING

    def of(self, budget: Budget) -> Budget:
        """What a call with this budget by the policy begins with now."""
        return entry_budget(budget, self._pool(), self._sharers)

    def of_call(self, call: ToolCall) -> Budget:
        """What this call begins with now."""
        return first_budget(call, self._state.policy, self._pool(), self._sharers)

    def _pool(self) -> int:
        return self._state.policy.memory.pool_bytes(self._state.host.memory_total_bytes)

    def now(self) -> tuple[int, int]:
        """For the children of any agent; nothing where the policy only observes, since nobody would answer a call."""
        if not self._state.policy.enforce:
            return NOTHING
        budget = self.of(self._state.policy.memory.budget)
        return budget.soft_bytes, budget.hard_bytes

    def given(self, parent: ToolCallId) -> None:
        """Its record was made with `now()`."""
        self._parents.add(parent)

    def give(self, parent: ToolCallId) -> None:
        """What it starts from now on has a budget. Safe where it has gone."""
        self._parents.add(parent)
        self._set(parent, self.now())

    def take(self, parent: ToolCallId) -> None:
        """What it starts from now on has none. Safe where it has gone."""
        self._parents.discard(parent)
        self._set(parent, NOTHING)

    def forget(self, parent: ToolCallId) -> None:
        """It is followed no more."""
        self._parents.discard(parent)

    def keep_up(self) -> bool:
        """At each turn: tell the kernel where it has changed. Whether it has."""
        sharers = 1 + sum(call.running and not call.exempt for call in self._state.tool_calls.values())
        if sharers > self._sharers or sharers <= self._sharers // 2:  # not with each call that comes and goes
            self._sharers = sharers
        if (now := self.now()) == self._told:
            return False
        self._told = now
        for parent in tuple(self._parents):
            self._set(parent, now)
        return True

    def _set(self, parent: ToolCallId, amounts: tuple[int, int]) -> None:
        if self._probes is None:
            return
        try:
            self._probes.set_child_budget(parent, soft_bytes=amounts[0], hard_bytes=amounts[1])
        except LookupError:
            self._parents.discard(parent)
