"""Who of a sandbox's processes speaks to a model: the runtimes, whose children have budgets, and who never has one.

Owns finding them, by the event of a connection or by a look at what runs already. Until one is found everything may
still be the agent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ....ebpf.errors import EbpfError
from ....ebpf.tool_memory import ToolMemory
from ....policies import roles
from ....policies.events import Event, RoleObserved, ToolCallStarted
from ....policies.model import CgroupId, ProcessRole, Role, ToolCallId, ToolCallSource
from ... import log
from .. import evidence, processes
from ..kept import Kept
from .helpers import Helpers
from .records import Records
from .sub_agents import SubAgents


class Runtimes:
    def __init__(
        self,
        probes: ToolMemory | None,
        records: Records,
        helpers: Helpers,
        sub_agents: SubAgents,
        calls: Mapping[ToolCallId, ToolCallStarted],
        now_ns: Callable[[], int],
    ) -> None:
        """`calls` are the tool calls that run now, by record."""
        self._probes = probes
        self._records = records
        self._helpers = helpers
        self._sub_agents = sub_agents
        self._calls = calls
        self._now_ns = now_ns
        self._taken_up: dict[ToolCallId, Kept] = {}
        """What ran before anybody followed it, by record, until a runtime is known above it."""
        self._calls_of_earlier: list[ToolCallStarted] = []
        """Calls that had no budget under an earlier run of the daemon: one may be an agent's."""

    def of(self, parent: ToolCallId | None, kept: Kept) -> int | None:
        """The runtime's process, where the record that forked is a runtime's, or was before it spoke to a model."""
        if parent is None:
            return None
        helper = self._helpers.get(parent)
        if helper is not None and helper.fact.pid in kept.runtimes.values():
            return helper.fact.pid
        return kept.runtimes.get(parent)

    def above(self, parent: ToolCallId | None, kept: Kept) -> int | None:
        """The process that is the runtime of what this record forks: also through its persistent shell, and also the
        sandbox's first program before it has spoken to a model."""
        if parent in kept.shells and (shell := self._helpers.get(parent)) is not None:
            parent = shell.agent
        found = self.of(parent, kept)
        return kept.agent_pid if found is None and parent is not None and parent == kept.agent_tag else found

    def connected(
        self, pid: int, tag: ToolCallId, is_agent: bool, kept: Kept, *, to_engine: bool = False
    ) -> Iterator[Event]:
        """Whoever speaks to a model is the agent: its children have budgets from now on, itself never."""
        if self._probes is None or pid in kept.runtimes.values():
            return
        command = evidence.command_line(pid)
        helper = self._helpers.get(tag)
        known = helper.fact.role.value if helper is not None else "none"
        log.debug("connected", pid=pid, tag=f"{tag:x}", is_agent=is_agent, role=known, command=command[:80])
        if not command or not roles.may_be_agent(command):
            return
        if is_agent and tag == kept.agent_tag and pid == kept.agent_pid:
            kept.runtimes[tag] = pid
            self._records.settled(tag)
            self._records.give_budgets(tag)
        elif helper is not None and (helper.fact.role is Role.START_UP or roles.is_agent(command)):
            try:
                tag = self._records.follow(pid, kept.cgroup.cgroup_id)
            except (ProcessLookupError, EbpfError) as error:
                log.warning("runtime_not_followed", pid=pid, error=str(error))
                return
            kept.runtimes[tag] = pid
        elif helper is None and tag in self._calls and (to_engine or roles.is_agent(command)):
            yield from self.at_sub_agents(self._sub_agents.found(pid, self._calls[tag], kept, heard=to_engine))
            return
        else:
            return  # a tool call, a service: they may speak to whom they like
        others = (h.fact for h in self._helpers.of(kept.cgroup.cgroup_id))
        launched = [fact.command for fact in others if fact.id not in self._taken_up]  # those it may run itself
        first = evidence.command_line(kept.agent_pid) if kept.agent_pid else ""
        profile = roles.profile_of([command, first, *self._ancestry(pid, kept), *launched])
        if len(kept.runtimes) == 1:
            kept.profile = profile
        else:
            self._sub_agents.apart(tag, roles.profile_of([command]) or kept.profile)
        named = profile.name if profile else "unknown"
        log.event("runtime_found", pid=pid, sandbox=kept.cgroup.path, agent=named, command=command[:80])
        why = "it has a connection" + (f", as {named}" if profile else "")
        fact = ProcessRole(tag, kept.cgroup.cgroup_id, pid, command, Role.RUNTIME, 0.95, why, self._now_ns())
        yield self._helpers.observe(tag, fact)

    def at_sub_agents(self, sub_agents: Iterable[Event]) -> Iterator[Event]:
        for event in sub_agents:
            if isinstance(event, RoleObserved):
                self._helpers.note(event.process.id, event.process, None)
            yield event

    def _ancestry(self, pid: int, kept: Kept) -> Iterator[str]:
        """Command lines of the processes between it and the sandbox's first program."""
        for _ in range(32):
            found = processes.stat(pid)
            if found is None or pid in (kept.agent_pid, 0, 1):
                return
            pid = found.parent_pid
            yield evidence.command_line(pid)

    def survey(self, kept: Kept) -> Iterator[Event]:
        """Runtimes among the processes that run already: those that hold a connection."""
        assert self._probes is not None
        tags = {tag for tag, h in self._helpers.all() if h.fact.sandbox == kept.cgroup.cgroup_id}
        for tag in (*([kept.agent_tag] if kept.agent_tag is not None else []), *tags):
            for pid in self._probes.processes(tag):
                if roles.may_be_agent(evidence.command_line(pid)) and evidence.has_connection(pid):
                    yield from self.connected(pid, tag, tag == kept.agent_tag, kept)

    def take_up(self, root: int, pids: Sequence[int], kept: Kept) -> Iterator[Event]:
        """Processes that ran before anybody followed them, `root` above the others: they may be the agent yet."""
        assert self._probes is not None
        sandbox = kept.cgroup.cgroup_id
        try:
            tag = self._probes.begin_tool(root, sandbox)
            self._probes.set_starting(tag, True)
        except (LookupError, ProcessLookupError, EbpfError):
            return  # it has ended meanwhile
        for pid in pids:
            if pid != root:
                try:
                    self._probes.adopt(pid, tag)
                except (LookupError, ProcessLookupError, EbpfError):
                    continue  # likewise
        why = "it ran before the daemon did, and may be the agent"
        command = evidence.command_line(root)
        fact = ProcessRole(tag, sandbox, root, command, Role.START_UP, 0.9, why, self._now_ns())
        self._taken_up[tag] = kept
        yield self._helpers.observe(tag, fact)

    def take_up_call(self, call: ToolCallStarted) -> None:
        """It had no budget under an earlier run of the daemon."""
        self._calls_of_earlier.append(call)

    def in_calls(self, book: Mapping[CgroupId, Kept], hears: Callable[[CgroupId], bool]) -> Iterator[Event]:
        """Agents that were found in calls by an earlier run of the daemon: found again."""
        calls, self._calls_of_earlier = self._calls_of_earlier, []
        for call in calls:
            kept, pid = book.get(call.sandbox), call.pid or 0
            command = evidence.command_line(pid)
            if kept is None or not roles.may_be_agent(command):
                continue
            if roles.is_agent(command) or evidence.has_connection(pid):
                yield from self.at_sub_agents(self._sub_agents.found(pid, call, kept, heard=hears(call.sandbox)))

    def below_runtimes(self) -> Iterator[tuple[ToolCallStarted, int, Kept]]:
        """Of what was taken up: who has a runtime above it, as the kernel would have told of its exec; that runtime."""
        for tag, kept in list(self._taken_up.items()):
            helper = self._helpers.get(tag)
            if helper is None or helper.fact.role is not Role.START_UP:
                del self._taken_up[tag]
                continue
            fact, found = helper.fact, processes.stat(helper.fact.pid)
            above = set(processes.ancestors(fact.pid))
            runtime = next((record for record, pid in kept.runtimes.items() if pid in above), None)
            if runtime is None or found is None:
                continue
            named, speaks = roles.is_agent(fact.command), evidence.has_connection(fact.pid)
            if speaks and not named and roles.may_be_agent(fact.command):
                continue  # it may be an agent as long as it does
            del self._taken_up[tag]
            try:
                leads = os.getsid(fact.pid) == fact.pid
            except ProcessLookupError:
                continue  # it has ended meanwhile
            source = ToolCallSource.LINEAGE
            said = (fact.since_ns, tag, fact.sandbox, fact.command, source, 0.5, fact.pid)
            yield ToolCallStarted(*said, agent=runtime, session_leader=leads), kept.runtimes[runtime], kept
