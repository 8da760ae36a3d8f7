"""Taking up again what an earlier run of the daemon left alive: sandboxes, agents, running calls.

Owns the one pass at the start. What was registered comes from the journal, which processes are whose from the cgroup
tree (`tools/<id>` is the call of that id) and the process tree. A process is taken for the one that is on record only
where its start time says so. A call keeps its id. What began while no daemon ran is a new call where the sandbox's
first program is the agent itself (`direct`); elsewhere it may be the agent, and roles.py finds out. What ended
meanwhile is said to have ended, and not how.

Long, since it is one pass whose steps share what it found of one sandbox.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies.document import NAME
from ...policies.events import (
    Event,
    SandboxRegistered,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
)
from ...policies.model import (
    NS_PER_S,
    CgroupId,
    Sandbox,
    SessionId,
    TenantId,
    ToolCall,
    ToolCallId,
    ToolCallPhase,
    ToolCallSource,
)
from ...policies.roles import HOOK
from ...policies.state import State
from .. import log
from ..errors import CgroupError
from . import processes
from .cgroups import OWN_LEAF, RUNTIME, TOOLS, CgroupDriver, SandboxCgroup
from .keeper import SandboxKeeper
from .kept import Kept
from .processes import PROC, ProcessRef, ProcessStat
from .roles import RoleKeeper
from .tool_calls import ToolCallKeeper

UNSEEN_CONFIDENCE = 0.5
"""A call that was found running: its beginning was not seen."""
_PASSES = 5
"""Over a call's processes, until one finds none that is not tagged: they fork meanwhile."""
_WRITTEN_EVERY_NS = NS_PER_S
_LOOK_AGAIN_S = (0.3, 1.0, 3.0, 0.0)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_COMMAND_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the journal knows of this boot."""

    sandboxes: tuple[Sandbox, ...] = ()
    """Registered and not removed."""
    calls: tuple[ToolCall, ...] = ()
    """That had not ended, or had left processes behind."""
    merged: Mapping[ToolCallId, ToolCallId] = field(default_factory=dict)
    """Wrappers and announcements, and the calls that they became."""
    recorded: frozenset[CgroupId] = frozenset()
    """Every sandbox that was ever registered: one that is not among the registered was removed on request."""
    until_ns: int = 0
    """When something was last written down: whatever pid is on record was its process's by then."""

    def call_of(self, merged: ToolCallId) -> ToolCallId:
        """What it became in the end; itself where it became nothing else."""
        for _ in self.merged:
            if merged not in self.merged:
                break
            merged = self.merged[merged]
        return merged


@dataclass(slots=True)
class Adopted:
    """What came of it."""

    sandboxes: list[str] = field(default_factory=list)
    calls: int = 0
    """Known before, and going on."""
    found: int = 0
    """Begun while no daemon ran."""
    wrappers: set[ToolCallId] = field(default_factory=set)
    """Known before as calls, and seen now to wrap another one."""
    closed: list[ToolCall] = field(default_factory=list)
    """Ended while no daemon ran, as they are to be remembered."""
    gone: list[CgroupId] = field(default_factory=list)
    """Sandboxes of which nothing is left."""
    left: dict[CgroupId, str] = field(default_factory=dict)
    """What lives and could not be taken up, one line for each sandbox."""

    def summary(self) -> str:
        """One line; empty where there was nothing."""
        if not (self.sandboxes or self.closed):
            return ""
        return (
            f"of an earlier run: {len(self.sandboxes)} sandboxes and {self.calls} tool calls taken up again, "
            f"{self.found} calls found that began meanwhile, {len(self.closed)} ended meanwhile"
        )


@dataclass(slots=True)
class _Group:
    """The processes of one call, its root first where it lives."""

    call: ToolCallId
    pids: list[int]
    root: int
    known: ToolCall | None
    leaf: str | None = None


class Adoption:
    """Run once, before anybody can register anything."""

    def __init__(
        self,
        keeper: SandboxKeeper,
        calls: ToolCallKeeper,
        roles: RoleKeeper,
        driver: CgroupDriver | None,
        probes: ToolMemory | None,
        state: State,
        emit: Callable[[Event], None],
        settle: Callable[[], None],
        now_ns: Callable[[], int],
        proc_root: Path = PROC,
    ) -> None:
        self._keeper = keeper
        self._calls = calls
        self._roles = roles
        self._driver = driver
        self._probes = probes
        self._state = state
        self._emit = emit
        self._settle = settle
        self._now_ns = now_ns
        self._proc = proc_root

    def run(self, earlier: Earlier) -> Adopted:
        """Never raises for one sandbox that cannot be taken up; the others are."""
        came = Adopted()
        going_on: set[ToolCallId] = set()
        for sandbox in (*earlier.sandboxes, *self._unrecorded(earlier)):
            if (cgroup := self._cgroup(sandbox, came)) is not None:
                going_on |= self._take_up(sandbox, cgroup, earlier, came)
        came.closed = [
            self._closed(call)
            for call in earlier.calls
            if call.id not in going_on and call.sandbox not in came.left
            if call.id not in earlier.merged and call.id not in came.wrappers
        ]
        self._calls.take_up([*(c for c in earlier.calls if c.id in going_on), *came.closed], earlier.merged)
        for line in came.left.values():
            log.warning("not_adopted", what=line)
        if summary := came.summary():
            log.event("adopted", sandboxes=",".join(came.sandboxes), calls=came.calls, found=came.found,
                      ended_meanwhile=len(came.closed))  # fmt: skip
            log.debug("adoption", summary=summary)
        return came

    async def look_again(self) -> None:
        """Some seconds long: a process that was on its way out when it was tagged had been seen off already."""
        if self._probes is None:
            return
        for pause_s in _LOOK_AGAIN_S:
            for event in self._probes.bury():
                self._emit(event)
            await asyncio.sleep(pause_s)

    # -- sandboxes

    def _cgroup(self, sandbox: Sandbox, came: Adopted) -> SandboxCgroup | None:
        """Where it can be taken up; else it is noted as gone, or as left."""
        if self._driver is None:
            if sandbox.path:
                came.left[sandbox.cgroup_id] = (
                    f"sandbox {sandbox.label}: its cgroup {sandbox.path} cannot be reached: run the daemon as root"
                )
                return None
            cgroup = SandboxCgroup("", sandbox.cgroup_id, "", own=False)
        elif not sandbox.path or self._driver.cgroup_id(sandbox.path) != sandbox.cgroup_id:
            came.gone.append(sandbox.cgroup_id)
            return None
        else:
            own = self._driver.owns(sandbox.path)
            runtime = f"{sandbox.path}/{RUNTIME}" if own else sandbox.path
            cgroup = SandboxCgroup(sandbox.path, sandbox.cgroup_id, runtime, own)
        alive = self._agent_of(sandbox) is not None
        inside = self._driver.processes(sandbox.path) if self._driver is not None and cgroup.own else ()
        if sandbox.agent_pid is not None and not alive and not inside:
            came.gone.append(sandbox.cgroup_id)
            return None
        if sandbox.tenant not in {tenant.id for tenant in self._state.policy.tenants}:
            came.left[sandbox.cgroup_id] = (
                f"sandbox {sandbox.label}: policy {self._state.policy.name} knows no such tenant: add it and restart, "
                f"or end its {len(inside)} processes"
            )
            return None
        return cgroup

    def _agent_of(self, sandbox: Sandbox) -> ProcessRef | None:
        """Alive, and still the same process."""
        if sandbox.agent_pid is None or sandbox.agent_start_ticks is None:
            return None
        agent = ProcessRef(sandbox.agent_pid, sandbox.agent_start_ticks)
        return agent if processes.look(agent, self._proc) is not None else None

    def _unrecorded(self, earlier: Earlier) -> Iterable[Sandbox]:
        """Sandboxes of our tree in which something runs and of which the journal knows nothing: it was lost."""
        if self._driver is None:
            return
        known = {sandbox.path for sandbox in earlier.sandboxes}
        for tenant in self._driver.children(self._driver.base):
            if tenant == f"{self._driver.base}/{OWN_LEAF}":
                continue
            for path in self._driver.children(tenant):
                name, owner = path.rpartition("/")[2], tenant.rpartition("/")[2]
                cgroup_id = self._driver.cgroup_id(path)
                pids = self._driver.processes(path)
                if path in known or cgroup_id is None or cgroup_id in earlier.recorded:
                    continue
                if not pids or not NAME.fullmatch(name):
                    continue
                agent = self._sole_root(self._driver.processes(f"{path}/{RUNTIME}"), pids)
                yield Sandbox(
                    cgroup_id=cgroup_id,
                    tenant=TenantId(owner),
                    name=name,
                    path=path,
                    session=SessionId(f"{owner}/{name}"),
                    agent_pid=agent.pid if agent is not None else pids[0],
                    agent_start_ticks=agent.start_ticks if agent is not None else 0,
                    registered_ns=self._now_ns(),
                )

    def _sole_root(self, runtime: Iterable[int], inside: Iterable[int]) -> ProcessRef | None:
        """The one process of a runtime that nobody of the sandbox has started: its agent."""
        members = set(inside)
        stats = {pid: found for pid in runtime if (found := processes.stat(pid, self._proc)) is not None}
        roots = [pid for pid, found in stats.items() if found.parent_pid not in members]
        return ProcessRef(roots[0], stats[roots[0]].start_ticks) if len(roots) == 1 else None

    def _take_up(self, sandbox: Sandbox, cgroup: SandboxCgroup, earlier: Earlier, came: Adopted) -> set[ToolCallId]:
        """Answers which of the known calls go on."""
        if cgroup.own and self._driver is not None:
            try:
                cgroup = self._driver.create_sandbox(sandbox.tenant, sandbox.name)  # a part of it may have been removed
            except CgroupError as error:
                came.left[sandbox.cgroup_id] = f"sandbox {sandbox.label}: {error}"
                return set()
        kept = Kept(cgroup, direct=sandbox.direct)
        self._keeper.book[cgroup.cgroup_id] = kept
        agent = self._agent_of(sandbox)
        self._emit(SandboxRegistered(self._now_ns(), replace(sandbox, cgroup_id=cgroup.cgroup_id)))
        self._settle()  # that the kernel may stop its calls is on record before they have budgets
        if agent is not None:
            try:
                self._keeper.follow(kept, agent)
            except EbpfError as error:
                came.left[sandbox.cgroup_id] = f"agent of sandbox {sandbox.label}: {error}"
            except ProcessLookupError:
                agent = None
        if kept.agent is None and sandbox.agent_pid is not None:
            kept.agent = ProcessRef(sandbox.agent_pid, sandbox.agent_start_ticks or 0)
        going_on = self._take_up_calls(sandbox, kept, agent, earlier, came)
        for event in self._roles.survey(kept) if self._probes is not None else ():
            self._emit(event)
        self._settle()
        came.sandboxes.append(sandbox.label)
        log.event("sandbox_adopted", sandbox=sandbox.label, cgroup=cgroup.path, pid=agent.pid if agent else None,
                  calls=len(going_on))  # fmt: skip
        if kept.agent_gone:
            self._keeper.remove_unless_used(cgroup.cgroup_id)
        return going_on

    # -- calls

    def _take_up_calls(
        self, sandbox: Sandbox, kept: Kept, agent: ProcessRef | None, earlier: Earlier, came: Adopted
    ) -> set[ToolCallId]:
        known = {call.id: call for call in earlier.calls if call.sandbox == sandbox.cgroup_id}
        cgroup = kept.cgroup
        groups = self._groups(kept, agent, known, earlier.until_ns)
        wrapped = self._wrapped(groups, earlier)
        going_on: set[ToolCallId] = set()
        started: set[ToolCallId] = set()
        for group in sorted(groups.values(), key=lambda g: g.call in wrapped):  # a call before its wrapper
            into = wrapped.get(group.call)
            if into is not None and into not in started:
                continue  # its call has ended: it only has to say so
            command = group.known.command if group.known is not None else self._command(group.root)
            if not command:
                continue  # it has ended while we looked
            if not self._tag(cgroup, group):
                continue  # likewise
            self._start(sandbox, group, command, groups[into] if into is not None else None)
            started.add(group.call)
            if self._probes is not None and (usage := self._probes.usage(group.call)) is not None:
                # One that stands still takes no step that would tell.
                self._emit(ToolCallMemoryStepped(self._now_ns(), group.call, usage.used_bytes, usage.peak_bytes))
            if into is not None:
                self._emit(ToolCallMerged(self._now_ns(), group.call, into))
                came.wrappers.add(group.call)
            elif group.known is not None:
                going_on.add(group.call)
                came.calls += 1
            else:
                came.found += 1
        if agent is not None:
            for call in known.values():
                if call.pid is None and call.running and call.id not in earlier.merged:
                    self._go_on_without_process(call)
                    going_on.add(call.id)
                    came.calls += 1
        return going_on

    def _go_on_without_process(self, known: ToolCall) -> None:
        """A hook announced it, and nobody has said that it is over."""
        self._emit(
            ToolCallStarted(
                at_ns=self._now_ns(),
                id=known.id,
                sandbox=known.sandbox,
                command=known.command,
                source=known.source,
                confidence=known.confidence,
                session=known.session,
                earlier=known,
            )
        )

    def _groups(
        self, kept: Kept, agent: ProcessRef | None, known: Mapping[ToolCallId, ToolCall], until_ns: int
    ) -> dict[ToolCallId, _Group]:
        """Who belongs to which call."""
        cgroup = kept.cgroup
        groups: dict[ToolCallId, _Group] = {}
        if cgroup.own and self._driver is not None:
            for leaf in self._driver.children(f"{cgroup.path}/{TOOLS}"):
                self._group_leaf(leaf, known, groups)
        else:
            for call in known.values():
                if call.pid is not None and self._began_by(call.pid, until_ns):
                    pids = list(processes.descendants(call.pid, self._proc))
                    groups[call.id] = _Group(call.id, pids, call.pid, call)
        seen = {pid for group in groups.values() for pid in group.pids}
        rest = set(processes.descendants(agent.pid, self._proc)) if agent is not None else set()
        if cgroup.own and self._driver is not None:
            rest |= set(self._driver.processes(cgroup.runtime))
        rest -= {agent.pid} if agent is not None else set()
        by_pid = {c.pid: c for c in known.values() if c.pid is not None and c.id not in groups}
        recorded = {pid: call for pid, call in by_pid.items() if self._began_by(pid, until_ns)}
        self._group_rest(rest - seen, kept, agent, recorded, groups)
        return groups

    def _group_leaf(self, leaf: str, known: Mapping[ToolCallId, ToolCall], groups: dict[ToolCallId, _Group]) -> None:
        assert self._driver is not None
        try:
            call = ToolCallId(int(leaf.rpartition("/")[2], 16))
        except ValueError:
            return  # none of ours
        pids = list(self._driver.processes(leaf))
        if not pids:
            self._driver.remove(leaf, patience_s=0.0)
            return
        record = known.get(call)
        stats = {pid: found for pid in pids if (found := processes.stat(pid, self._proc)) is not None}
        if record is not None and record.pid in stats:
            root = record.pid
        else:
            tops = [pid for pid, found in stats.items() if found.parent_pid not in stats]
            root = min(tops or pids, key=lambda pid: stats[pid].start_ticks if pid in stats else 0)
        groups[call] = _Group(call, [root, *(pid for pid in pids if pid != root)], root, record, leaf)

    def _group_rest(
        self,
        rest: set[int],
        kept: Kept,
        agent: ProcessRef | None,
        recorded: Mapping[int, ToolCall],
        groups: dict[ToolCallId, _Group],
    ) -> None:
        """Processes in no leaf: the agent's forks, what has not been moved yet, what began meanwhile."""
        stats = {pid: found for pid in rest if (found := processes.stat(pid, self._proc)) is not None and found.alive}
        roots: dict[int, list[int]] = {}
        for pid in sorted(stats, key=lambda each: stats[each].start_ticks):
            if self._probes is not None and self._probes.tag_of(pid) is not None:
                continue  # born since its agent is followed: the kernel tells of it
            root = _top_execed(pid, stats)
            if root is not None:
                roots.setdefault(root, []).append(pid)
            elif agent is not None and not self._join_agent(agent, pid):
                roots.setdefault(pid, []).append(pid)
        for root, pids in roots.items():
            record = recorded.get(root)
            if record is None and not kept.direct and self._probes is not None:
                # It may be the agent: what it is shows when it speaks.
                for event in self._roles.take_up(root, pids, kept):
                    self._emit(event)
                continue
            if record is None and HOOK.search(self._command(root)):
                continue
            call = record.id if record is not None else self._calls.new_id()
            groups[call] = _Group(call, [root, *(pid for pid in pids if pid != root)], root, record)

    def _join_agent(self, agent: ProcessRef, pid: int) -> bool:
        """A fork of the agent that has not exec'd: when it does, that is a call. False: it has, meanwhile."""
        if self._probes is None or (tag := self._probes.tag_of(agent.pid)) is None:
            return True
        try:
            self._probes.adopt(pid, tag)
        except (EbpfError, ProcessLookupError):
            return True
        found = processes.stat(pid, self._proc)
        return found is None or not found.execed or self._probes.tag_of(pid) != tag

    def _wrapped(self, groups: Mapping[ToolCallId, _Group], earlier: Earlier) -> dict[ToolCallId, ToolCallId]:
        """Wrappers, by the journal, or because the root of another call is below them: calls do not nest, but where an
        agent in a call has calls of its own. Such a call has no budget, or the agent has left it and is in no group."""
        wrapped = {}
        by_pid = {pid: call for call, group in groups.items() for pid in group.pids}
        for call in groups:
            if call in earlier.merged:
                wrapped[call] = earlier.call_of(call)
        for call, group in groups.items():
            for above in processes.ancestors(group.root, self._proc):
                outer = by_pid.get(above)
                if outer is None:
                    break
                known = groups[outer].known
                if outer != call and outer not in wrapped and not (known is not None and known.exempt):
                    wrapped[outer] = call
        return wrapped

    def _tag(self, cgroup: SandboxCgroup, group: _Group) -> bool:
        """Have the kernel follow it. False: all of it has ended, or the kernel cannot."""
        if self._probes is None:
            return True
        soft, hard = self._calls.budget_of(group.known) if group.known is not None else (0, 0)
        for pid in group.pids:
            try:
                self._probes.begin_tool(pid, cgroup.cgroup_id, tag=group.call, soft_bytes=soft, hard_bytes=hard)
            except ProcessLookupError:
                continue
            except EbpfError as error:
                log.warning("call_not_followed", call=f"{group.call:016x}", error=error)
                return False
            group.root = pid
            break
        else:
            return False
        for _ in range(_PASSES):
            if group.leaf is not None and self._driver is not None:
                pids = list(self._driver.processes(group.leaf))
            else:
                pids = list(dict.fromkeys([*group.pids, *processes.descendants(group.root, self._proc)]))
            untagged = [pid for pid in pids if self._probes.tag_of(pid) is None]
            for pid in untagged:
                try:
                    self._probes.adopt(pid, group.call)
                except (EbpfError, ProcessLookupError):
                    continue  # it has ended meanwhile
            if not untagged:
                break
        return True

    def _start(self, sandbox: Sandbox, group: _Group, command: str, inner: _Group | None) -> None:
        """Say that it goes on, or that it was found. `inner`: the call that it wraps."""
        known, now_ns = group.known, self._now_ns()
        if known is None:
            began_ns = self._started_ns(group.root) or now_ns
            if inner is not None and inner.known is not None:
                began_ns = inner.known.start_ns + 1  # the call knows better when it began
            self._emit(
                ToolCallStarted(
                    at_ns=min(began_ns, now_ns),
                    id=group.call,
                    sandbox=sandbox.cgroup_id,
                    command=command,
                    source=ToolCallSource.LINEAGE,
                    confidence=UNSEEN_CONFIDENCE,
                    pid=group.root,
                    session=inner.known.session if inner is not None and inner.known is not None else None,
                )
            )
            return
        soft, hard = self._calls.budget_of(known)
        self._emit(
            ToolCallStarted(
                at_ns=now_ns,
                id=known.id,
                sandbox=sandbox.cgroup_id,
                command=command,
                source=known.source,
                confidence=known.confidence,
                pid=group.root,
                session=known.session,
                soft_bytes=soft,
                hard_bytes=hard,
                earlier=known,
            )
        )
        if known.running and group.root != known.pid and known.pid is not None:
            # What is left are processes that outlived it.
            self._emit(ToolCallEnded(now_ns, known.id, None, None, escaped_count=len(group.pids)))

    def _closed(self, call: ToolCall) -> ToolCall:
        """Nothing of it is left: it ended by now, and nobody knows when and how."""
        now_ns = self._now_ns()
        return replace(
            call,
            phase=ToolCallPhase.ENDED,
            end_ns=call.end_ns if call.end_ns is not None else max(now_ns, call.start_ns),
            gone_ns=now_ns,
            used_bytes=0,
            stopped_ns=None,
            waiting_until_ns=None,
        )

    # -- processes

    def _began_by(self, pid: int, until_ns: int) -> bool:
        """Whether the process was there when its pid was last on record: a later one has it by chance."""
        began_ns = self._started_ns(pid)
        return began_ns is not None and began_ns <= until_ns + _WRITTEN_EVERY_NS

    def _started_ns(self, pid: int) -> int | None:
        """On the monotonic clock; /proc counts from the boot, suspended time included."""
        found = processes.stat(pid, self._proc)
        if found is None or not found.alive:
            return None
        suspended_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return found.start_ticks * (NS_PER_S // _TICKS_PER_S) - suspended_ns

    def _command(self, pid: int) -> str:
        try:
            with (self._proc / str(pid) / "cmdline").open("rb") as file:
                return file.read(_COMMAND_BYTES).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""


def _top_execed(pid: int, stats: Mapping[int, ProcessStat]) -> int | None:
    """Of the process and those above it, within `stats`: the one furthest up that has exec'd."""
    root = None
    while (found := stats.get(pid)) is not None:
        if found.execed:
            root = pid
        pid = found.parent_pid
    return root
