"""Agents inside tool calls: `claude -p` that Codex asked for, a script of a call that speaks to our engine.

Owns which calls hold one. An agent is never stopped or ended for a tool call's budget, whoever started it, so it has a
record of its own, with calls of its own below it. The call that started it stays a call, since its agent waits for it.
Where the agent is the call's first program, the call's own record is the agent's, and has no budget; else the rest of
the call (`sh -c`, what comes after the agent) keeps its budget.

Within a call who is an agent is told by its name, or by its connection to an engine of ours: calls may speak to whom
they like otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies import roles
from ...policies.events import BudgetChanged, Event, RoleObserved, ToolCallAttributed, ToolCallLeft, ToolCallStarted
from ...policies.model import ProcessRole, Role, ToolCallId
from ...policies.roles import Profile
from .. import log
from . import evidence
from .kept import Kept
from .records import Records


@dataclass(frozen=True, slots=True)
class SubAgent:
    """By its record: what its children are judged by, in place of what holds for the agent of the sandbox."""

    profile: Profile | None
    heard: bool
    """An engine of ours hears its conversation."""
    call: ToolCallId
    """That it is in."""


class SubAgents:
    def __init__(self, probes: ToolMemory | None, records: Records, now_ns: Callable[[], int]) -> None:
        self._probes = probes
        self._records = records
        self._now_ns = now_ns
        self._known: dict[ToolCallId, SubAgent] = {}

    def of(self, parent: ToolCallId | None) -> SubAgent | None:
        """Whose child it is; None: no sub-agent's."""
        return self._known.get(parent) if parent is not None else None

    def has(self, call: ToolCallId) -> bool:
        """Whether an agent was found in it."""
        return any(sub_agent.call == call for sub_agent in self._known.values())

    def apart(self, record: ToolCallId, profile: Profile | None) -> None:
        """One more runtime of a sandbox, started as no call: its children are judged by its own ways."""
        self._known[record] = SubAgent(profile, heard=True, call=record)

    def ended(self, record: ToolCallId, kept: Kept) -> None:
        """A call, or a record of a sub-agent, has ended. Safe for any other."""
        if self._known.pop(record, None) is not None:
            kept.runtimes.pop(record, None)

    def at_budget(self, call: ToolCallStarted, kept: Kept) -> Iterator[Event]:
        """Of a call that stands at its budget: the agents by name in it, which may speak to their model any moment."""
        assert self._probes is not None
        for pid in self._probes.processes(call.id):
            if roles.is_agent(evidence.command_line(pid)):
                yield from self.found(pid, call, kept, heard=False)

    def found(self, pid: int, call: ToolCallStarted, kept: Kept, *, heard: bool) -> Iterator[Event]:
        """A process of this call is an agent."""
        assert self._probes is not None
        command, now_ns = evidence.command_line(pid), self._now_ns()
        sub_agent = SubAgent(roles.profile_of([command]), heard, call.id)
        log.event("sub_agent_found", pid=pid, sandbox=kept.cgroup.path, call=f"{call.id:016x}", command=command[:80])
        if pid == call.pid:
            self._records.parts_ways(call.id)
            self._records.give_budgets(call.id)
            self._records.exempt(call.id)
            self._known[call.id] = sub_agent
            kept.runtimes[call.id] = pid
            yield ToolCallAttributed(now_ns, call.id, call.source, call.confidence, exempt=True)
            yield BudgetChanged(now_ns, call.id, 0, 0)
            return
        try:
            record = self._records.follow(pid, kept.cgroup.cgroup_id)
        except (ProcessLookupError, EbpfError) as error:
            log.warning("runtime_not_followed", pid=pid, error=str(error))
            return
        self._probes.resume(record)  # the call's budget may have stopped it
        self._records.go_on(call.id)
        self._known[record] = sub_agent
        kept.runtimes[record] = pid
        yield ToolCallLeft(now_ns, call.id, pid)
        why = "it is in a tool call, and has a connection"
        yield RoleObserved(now_ns, ProcessRole(record, call.sandbox, pid, command, Role.RUNTIME, 0.9, why, now_ns))
