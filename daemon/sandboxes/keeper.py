"""Sandboxes: registering, finding and removing them.

Owns the bookkeeping between a sandbox, its directories and its agent's tag in the kernel. It applies no policy. Works
without eBPF: then its tool calls come from wrappers and hooks alone. Works without cgroups: then a sandbox is its agent
and the processes below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies.events import Event, ProcessesGone, RoleObserved, SandboxRegistered, SandboxRemoved
from ...policies.model import CgroupId, Role, Sandbox, SessionId, TenantId
from ...policies.state import State
from .. import log
from ..errors import CgroupError
from . import processes, registering
from .cgroups import CgroupDriver, SandboxCgroup
from .entry import NOTHING, EntryBudgets
from .kept import Book, Kept
from .processes import ProcessRef
from .watch import unwatch, watch


class SandboxKeeper:
    """Registers, follows and removes. Also a sink of the loop: `keeper(event, state)`."""

    def __init__(
        self,
        driver: CgroupDriver | None,
        probes: ToolMemory | None,
        state: State,
        emit: Callable[[Event], None],
        settle: Callable[[], None],
        now_ns: Callable[[], int],
    ) -> None:
        """`settle` takes in everything that waits, the kernel's events too; never called as a sink."""
        self.book: Book = {}
        self.entry = EntryBudgets(probes, state)
        self._driver = driver
        self._probes = probes
        self._state = state
        self._emit = emit
        self._settle = settle
        self._now_ns = now_ns
        self._names = count(1)

    def find(self, tenant: str, name: str) -> Sandbox | None:
        return next((s for s in self._state.sandboxes.values() if s.tenant == tenant and s.name == name), None)

    def find_by_pid(self, pid: int) -> Sandbox | None:
        """The sandbox a process is in: by its tag, which survives a change of cgroup, else by its cgroup."""
        tag = self._probes.tag_of(pid) if self._probes else None
        if tag is not None:
            call = self._state.tool_calls.get(self._state.resolve(tag))
            if call is not None:
                return self._state.sandboxes.get(call.sandbox)
            kept = next((key for key, k in self.book.items() if tag in (k.agent_tag, *k.runtimes, *k.shells)), None)
            if kept is not None:
                return self._state.sandboxes.get(kept)
        if self._driver is None:
            return self._find_by_ancestry(pid)
        path = self._driver.cgroup_of(pid)
        if path is None:
            return None
        inside = (s for s in self._state.sandboxes.values() if f"{path}/".startswith(f"{s.path}/"))
        return max(inside, key=lambda s: len(s.path), default=None)

    def _find_by_ancestry(self, pid: int) -> Sandbox | None:
        """One that was orphaned has left its agent's tree and is missed."""
        agents = {s.agent_pid: s for s in self._state.sandboxes.values()}
        while (sandbox := agents.get(pid)) is None:
            found = processes.stat(pid)
            if found is None or found.parent_pid == 0:
                return None
            pid = found.parent_pid
        return sandbox

    def register(
        self,
        tenant: TenantId,
        name: str,
        pid: int | None,
        cgroup_path: str | None,
        session: SessionId | None,
        *,
        direct: bool = False,
    ) -> Sandbox:
        """Make or adopt the sandbox's cgroup, move the agent into it and follow what it execs.

        A known sandbox takes in its first agent, or the next one after its agent has gone; with the agent that it has
        it is answered as it is. Raises RegistrationRefused before anything is touched; CgroupError, EbpfError and
        ProcessLookupError after everything is as it was again.
        """
        registering.check_name(name)
        agent = registering.check_process(pid) if pid is not None else None
        known = self.find(tenant, name)
        if cgroup_path and self._driver is not None:
            others = (s for s in self._state.sandboxes.values() if s is not known)
            cgroup_path = registering.check_cgroup(cgroup_path, self._driver, others)
        if agent is not None:
            registering.check_free(agent.pid, self.find_by_pid(agent.pid), f"{tenant}/{name}")
        kept = self.book.get(known.cgroup_id) if known is not None else None
        if known is not None and kept is not None:
            if cgroup_path and cgroup_path != known.path:
                raise registering.elsewhere(known, cgroup_path)
            if agent is None or agent == kept.agent:
                return self._with_session(known, session)
            if kept.agent is not None and processes.look(kept.agent) is not None:
                raise registering.held(known, self._now_ns())
            cgroup, session = kept.cgroup, session or known.session
        else:
            cgroup = self._cgroup(tenant, name, cgroup_path)
            kept = Kept(cgroup)
        kept.direct = direct
        try:
            if agent is not None:
                self._take_in_agent(kept, agent)
        except (CgroupError, EbpfError, ProcessLookupError):
            if known is None and cgroup.own:
                self._remove_cgroup(cgroup)
            raise
        self.book[cgroup.cgroup_id] = kept
        sandbox = Sandbox(
            cgroup_id=cgroup.cgroup_id,
            tenant=tenant,
            name=name,
            path=cgroup.path,
            session=session or SessionId(f"{tenant}/{name}"),
            agent_pid=pid,
            agent_start_ticks=agent.start_ticks if agent is not None else None,
            registered_ns=self._now_ns(),
            direct=direct,
        )
        self._emit(SandboxRegistered(sandbox.registered_ns, sandbox))
        log.event("sandbox_registered", sandbox=sandbox.label, cgroup=cgroup.path, cgroup_id=cgroup.cgroup_id, pid=pid)
        return sandbox

    def _with_session(self, known: Sandbox, session: SessionId | None) -> Sandbox:
        """Registered again as it is, for another session perhaps."""
        if session is not None and session != known.session:
            known = replace(known, session=session)
            self._emit(SandboxRegistered(self._now_ns(), known))
        return known

    @property
    def _cgroups(self) -> CgroupDriver:
        """For what has a cgroup of ours: without a driver nothing has."""
        assert self._driver is not None
        return self._driver

    def _cgroup(self, tenant: TenantId, name: str, cgroup_path: str | None) -> SandboxCgroup:
        if self._driver is not None:
            return self._driver.adopt(cgroup_path) if cgroup_path else self._driver.create_sandbox(tenant, name)
        if cgroup_path:
            raise CgroupError(f"{cgroup_path}: no cgroups can be used here: run the daemon as root, see its `lacks`")
        # A number of ours stands for the cgroup id that there is none of.
        number = next(n for n in self._names if n not in self.book)
        return SandboxCgroup("", CgroupId(number), "", own=False)

    def _take_in_agent(self, kept: Kept, agent: ProcessRef) -> None:
        """Or leave it where and as it was."""
        cgroup, pid = kept.cgroup, agent.pid
        came_from = self._cgroups.whereabouts(pid) if cgroup.own else ()
        if cgroup.own:
            joined = self._cgroups.attach(pid, cgroup.runtime)
            if not joined.done:
                raise CgroupError(f"pid {pid} could not be moved to {cgroup.runtime}: {joined.detail or 'it is gone'}")
        try:
            self.follow(kept, agent)
        except (EbpfError, ProcessLookupError):
            if cgroup.own:
                self._cgroups.put_back(pid, came_from)
            raise

    def follow(self, kept: Kept, agent: ProcessRef) -> None:
        """Tag the agent and watch for its end. Raises EbpfError, ProcessLookupError; then nothing has changed."""
        cgroup, tag = kept.cgroup, None
        if self._probes is not None:
            # Whose children have budgets is known when somebody has spoken to a model (roles.py), or has been said.
            soft, hard = self.entry.now() if kept.direct else NOTHING
            tag = self._probes.register_agent(
                agent.pid, cgroup.cgroup_id, soft_bytes=soft, hard_bytes=hard, starting=not kept.direct
            )
            if kept.direct:
                self.entry.given(tag)
        if processes.look(agent) is None:  # its pid may be another's by now
            if tag is not None and self._probes is not None:
                self._probes.forget(tag)
                self.entry.forget(tag)
            raise ProcessLookupError(f"no process {agent.pid}")
        if self._probes is not None:
            for old in kept.tags():
                self._probes.forget(old)
                self.entry.forget(old)
        kept.runtimes = {tag: agent.pid} if kept.direct and tag is not None else {}
        kept.shells, kept.profile = {}, None
        unwatch(kept.pidfd)
        kept.agent, kept.agent_tag = agent, tag
        kept.pidfd = watch(agent.pid, lambda: self._agent_exited(cgroup.cgroup_id, agent))

    def _agent_exited(self, cgroup_id: CgroupId, agent: ProcessRef) -> None:
        kept = self.book.get(cgroup_id)
        if kept is None or kept.agent != agent:
            return  # another has its place
        unwatch(kept.pidfd)
        kept.pidfd = None
        sandbox = self._state.sandboxes.get(cgroup_id)
        log.event("agent_gone", sandbox=sandbox.label if sandbox else cgroup_id)
        self._settle()  # what it started last may still wait in the kernel's buffer
        self.remove_unless_used(cgroup_id)

    def remove_unless_used(self, cgroup_id: CgroupId) -> None:
        calls = (c for c in self._state.tool_calls.values() if c.sandbox == cgroup_id and c.gone_ns is None)
        others = (p for p in self._state.processes.values() if p.sandbox == cgroup_id and p.role is not Role.WRAPPER)
        kept = self.book.get(cgroup_id)
        # Of an agent that is the sandbox's first process no event tells the end: its pidfd does.
        first = kept.agent_tag if kept is not None and kept.agent_gone else None
        if not any(call.pid is not None for call in calls) and all(p.id == first for p in others):
            # A call without a process ends with its agent.
            self.remove(cgroup_id)

    def remove(self, cgroup_id: CgroupId) -> str:
        """Forget a sandbox and remove its cgroup where we made it. Answers why it could not be removed, or ""."""
        kept = self.book.pop(cgroup_id, None)
        if kept is None:
            return ""
        unwatch(kept.pidfd)
        if self._probes is not None:
            for tag in kept.tags():
                self._probes.forget(tag)
                self.entry.forget(tag)
        self._emit(SandboxRemoved(self._now_ns(), cgroup_id, kept.cgroup.path))
        if self._driver is None:
            return ""
        self._driver.forget(kept.cgroup.path)
        if not kept.cgroup.own:
            return ""
        return self._remove_cgroup(kept.cgroup)

    def _remove_cgroup(self, cgroup: SandboxCgroup) -> str:
        """One that we made, and its tenant's with the last. Answers why it could not be removed, or ""."""
        removed = self._cgroups.remove(cgroup.path)
        self._cgroups.remove_where_empty(cgroup.path.rpartition("/")[0])
        return "" if removed.done else removed.detail

    def disarm(self, cgroup_id: CgroupId) -> None:
        """Take the hard budgets of a sandbox's tool calls away: nobody could undo a stop there."""
        kept = self.book.get(cgroup_id)
        if kept is not None:
            for tag in kept.tags():
                self.entry.take(tag)

    def close(self) -> None:
        """Watch nobody any more. A sandbox in which something runs stays, for the next start to take up again."""
        for cgroup_id, kept in list(self.book.items()):
            unwatch(kept.pidfd)
            kept.pidfd = None
            if kept.cgroup.own and not self._cgroups.processes(kept.cgroup.path):
                self.remove(cgroup_id)
            elif kept.agent is not None:
                sandbox = self._state.sandboxes.get(cgroup_id)
                log.event("sandbox_left", sandbox=sandbox.label if sandbox else cgroup_id, pid=kept.agent.pid)

    # -- as a sink of the loop

    def __call__(self, event: Event, state: State) -> None:
        match event:
            case ProcessesGone():
                known = state.tool_calls.get(state.resolve(event.id))
                sandbox = known.sandbox if known else None
            case RoleObserved() if event.process.gone:
                sandbox = event.process.sandbox
            case _:
                return
        kept = self.book.get(sandbox) if sandbox is not None else None
        if sandbox is not None and kept is not None and kept.agent_gone:
            self.remove_unless_used(sandbox)  # the agent has gone before the last of what it left
