"""The kernel's records of processes, as the roles of these want them: who has a budget, whose execs are calls.

Owns nothing but the way to say it. A record that has gone meanwhile is nobody's fault: all of it is safe then.
"""

from __future__ import annotations

from ....ebpf.tool_memory import ToolMemory
from ....policies.model import CgroupId, ToolCallId
from ..entry import EntryBudgets


class Records:
    def __init__(self, probes: ToolMemory | None, entry: EntryBudgets) -> None:
        """Without probes (None) there are no records, and nobody asks for one."""
        self._loaded = probes
        self._entry = entry

    @property
    def _probes(self) -> ToolMemory:
        assert self._loaded is not None
        return self._loaded

    def follow(self, pid: int, sandbox: CgroupId) -> ToolCallId:
        """A record of its own as a parent of tool calls. Raises ProcessLookupError, EbpfError."""
        soft, hard = self._entry.now()
        record = self._probes.register_agent(pid, sandbox, soft_bytes=soft, hard_bytes=hard)
        self._entry.given(record)
        return record

    def give_budgets(self, agent: ToolCallId) -> None:
        """What it starts from now on begins with a budget."""
        self._entry.give(agent)

    def forget_budgets(self, agent: ToolCallId) -> None:
        """It has gone: nothing is told to it any more."""
        self._entry.forget(agent)

    def parts_ways(self, record: ToolCallId) -> None:
        """What its processes exec has a record of its own from now on."""
        try:
            self._probes.set_starting(record, True)
        except LookupError:
            pass

    def settled(self, record: ToolCallId) -> None:
        """It is known what it is: what its processes exec belongs to it from now on."""
        try:
            self._probes.set_starting(record, False)
        except LookupError:
            pass

    def exempt(self, record: ToolCallId) -> None:
        """No budget; and it goes on where the budget it began with has stopped it already."""
        try:
            self._probes.set_budget(record, soft_bytes=0, hard_bytes=0)
            usage = self._probes.usage(record)
            if usage is not None and usage.stalled_since_ns is not None:
                self._probes.resume(record)
        except LookupError:
            pass

    def go_on(self, record: ToolCallId) -> None:
        """Continue what stands at its budget, where it does not need that any more."""
        usage = self._probes.usage(record)
        if usage is None or (usage.hard_bytes and usage.used_bytes > usage.hard_bytes):
            return
        try:
            self._probes.resume(record)
        except LookupError:
            pass
