"""Sandboxes and the tool calls in them: who is in which cgroup under which tag.

Owns the bookkeeping between a sandbox, its directories, its agent's tag in the kernel, the leaf of each tool call and
the ids that callers use. It applies no policy: budgets come from the policy in force, verdicts from decide().
Works without eBPF: then a call's boundaries come from wrappers and hooks alone, its memory from its leaf's counter.
Works without cgroups: then a sandbox is its agent and the processes below it, and no tool call has a leaf.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies.document import NAME
from ...policies.events import (
    BudgetChanged,
    Event,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
)
from ...policies.model import CgroupId, Sandbox, SessionId, TenantId, ToolCall, ToolCallId, ToolCallSource
from ...policies.state.state import State
from .. import log
from ..errors import CgroupError
from . import processes
from .cgroups import CgroupDriver, SandboxCgroup

WRAPPER_CONFIDENCE = 1.0
HOOK_CONFIDENCE = 0.95
"""A hook's boundaries are exact; which processes are meant is inferred from what is exec'd meanwhile."""
REPORT_GRACE_S = 0.5
"""Without probes: how long after its root process has exited a wrapper may say with which exit code."""


@dataclass(slots=True)
class _Kept:
    """One sandbox as it is kept here."""

    cgroup: SandboxCgroup
    agent_tag: ToolCallId | None = None
    pidfd: int | None = None
    announced: list[ToolCallId] = field(default_factory=list)
    """Hook calls that no process has been matched with yet, oldest first."""


@dataclass(slots=True)
class _Leaf:
    """A tool call with a cgroup of its own."""

    path: str
    sandbox: CgroupId


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
        self._driver = driver
        self._probes = probes
        self._state = state
        self._emit = emit
        self._settle = settle
        self._now_ns = now_ns
        self._kept: dict[CgroupId, _Kept] = {}
        self._leaves: dict[ToolCallId, _Leaf] = {}
        self._roots: dict[ToolCallId, int] = {}
        """Without probes: a pidfd of the root process of each call."""
        self._names = count(1)
        self._external: dict[tuple[CgroupId, str], ToolCallId] = {}

    # -- sandboxes

    def find(self, tenant: str, name: str) -> Sandbox | None:
        return next((s for s in self._state.sandboxes.values() if s.tenant == tenant and s.name == name), None)

    def find_by_pid(self, pid: int) -> Sandbox | None:
        """The sandbox a process is in: by its tag, which survives a change of cgroup, else by its cgroup."""
        tag = self._probes.tag_of(pid) if self._probes else None
        if tag is not None:
            call = self._state.tool_calls.get(self._state.resolve(tag))
            if call is not None:
                return self._state.sandboxes.get(call.sandbox)
            kept = next((key for key, k in self._kept.items() if k.agent_tag == tag), None)
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
        self, tenant: TenantId, name: str, pid: int | None, cgroup_path: str | None, session: SessionId | None
    ) -> Sandbox:
        """Make or adopt the sandbox's cgroup, move the agent into it and follow what it execs.

        Registering a known sandbox again only takes in a new agent. Raises CgroupError, ProcessLookupError; then
        nothing of it is left.
        """
        known = self.find(tenant, name)
        if known is not None and known.cgroup_id in self._kept:
            cgroup, session = self._kept[known.cgroup_id].cgroup, session or known.session
        else:
            cgroup = self._cgroup(tenant, name, cgroup_path)
        kept = self._kept.get(cgroup.cgroup_id) or _Kept(cgroup)
        try:
            if pid is not None:
                self._take_in_agent(kept, pid)
        except (CgroupError, EbpfError, ProcessLookupError):
            if known is None and cgroup.own:
                self._cgroups.remove(cgroup.path)
            raise
        self._kept[cgroup.cgroup_id] = kept
        sandbox = Sandbox(
            cgroup_id=cgroup.cgroup_id,
            tenant=tenant,
            name=name,
            path=cgroup.path,
            session=session or SessionId(f"{tenant}/{name}"),
            agent_pid=pid if pid is not None else (known.agent_pid if known else None),
            registered_ns=self._now_ns(),
        )
        self._emit(SandboxRegistered(sandbox.registered_ns, sandbox))
        log.event("sandbox_registered", sandbox=sandbox.label, cgroup=cgroup.path, cgroup_id=cgroup.cgroup_id, pid=pid)
        return sandbox

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
        if not NAME.fullmatch(name):
            raise CgroupError(f"sandbox name {name!r}: use up to 64 letters, digits, '.', '_' and '-'")
        # A number of ours stands for the cgroup id that there is none of.
        return SandboxCgroup("", CgroupId(next(self._names)), "", own=False)

    def _take_in_agent(self, kept: _Kept, pid: int) -> None:
        cgroup = kept.cgroup
        if cgroup.own:
            joined = self._cgroups.attach(pid, cgroup.runtime)
            if not joined.done:
                raise CgroupError(f"pid {pid} could not be moved to {cgroup.runtime}: {joined.detail or 'it is gone'}")
        if self._probes is not None:
            if kept.agent_tag is not None:
                self._probes.forget(kept.agent_tag)
            budget = self._state.policy.memory.budget if self._state.policy.enforce else None
            kept.agent_tag = self._probes.register_agent(
                pid,
                cgroup.cgroup_id,
                soft_bytes=budget.soft_bytes if budget else 0,
                hard_bytes=budget.hard_bytes if budget else 0,
            )
        self._unwatch(kept.pidfd)
        kept.pidfd = self._watch(pid, lambda: self._agent_exited(cgroup.cgroup_id))

    def _agent_exited(self, cgroup_id: CgroupId) -> None:
        kept = self._kept.get(cgroup_id)
        if kept is None:
            return
        self._unwatch(kept.pidfd)
        kept.pidfd = None
        sandbox = self._state.sandboxes.get(cgroup_id)
        log.event("agent_gone", sandbox=sandbox.label if sandbox else cgroup_id)
        self._settle()  # what it started last may still wait in the kernel's buffer
        self._remove_unless_used(cgroup_id)

    def _remove_unless_used(self, cgroup_id: CgroupId) -> None:
        if not any(c.sandbox == cgroup_id and c.gone_ns is None for c in self._state.tool_calls.values()):
            self.remove(cgroup_id)

    def remove(self, cgroup_id: CgroupId) -> str:
        """Forget a sandbox and remove its cgroup where we made it. Answers why it could not be removed, or ""."""
        kept = self._kept.pop(cgroup_id, None)
        if kept is None:
            return ""
        self._unwatch(kept.pidfd)
        if kept.agent_tag is not None and self._probes is not None:
            self._probes.forget(kept.agent_tag)
        for call in [key for key, leaf in self._leaves.items() if leaf.sandbox == cgroup_id]:
            del self._leaves[call]
        self._external = {key: call for key, call in self._external.items() if key[0] != cgroup_id}
        self._emit(SandboxRemoved(self._now_ns(), cgroup_id, kept.cgroup.path))
        if self._driver is None:
            return ""
        self._driver.forget(kept.cgroup.path)
        if not kept.cgroup.own:
            return ""
        removed = self._driver.remove(kept.cgroup.path)
        return "" if removed.done else removed.detail

    def disarm(self, cgroup_id: CgroupId) -> None:
        """Take the hard budgets of a sandbox's tool calls away: nobody could undo a stop there."""
        kept = self._kept.get(cgroup_id)
        if kept is not None and kept.agent_tag is not None and self._probes is not None:
            self._probes.set_child_budget(kept.agent_tag, soft_bytes=0, hard_bytes=0)

    def close(self) -> None:
        """Forget everything; sandboxes in which something still runs keep their cgroups."""
        for pidfd in self._roots.values():
            self._unwatch(pidfd)
        self._roots.clear()
        for cgroup_id in list(self._kept):
            if problem := self.remove(cgroup_id):
                log.warning("sandbox_left", problem=problem)

    # -- tool calls

    def begin(
        self,
        sandbox: Sandbox,
        command: str,
        pid: int | None,
        wrapper_pid: int | None,
        external: str | None,
        session: SessionId | None,
    ) -> ToolCallId:
        """A wrapper or a hook says that a tool call begins. Raises ProcessLookupError, CgroupError, EbpfError."""
        if external and (known := self._external.get((sandbox.cgroup_id, external))) is not None:
            return self._state.resolve(known)
        call = self._begin_process(sandbox, command, pid, wrapper_pid, session) if pid else None
        if call is None:
            call = self._announce(sandbox, command, session)
        if external:
            self._external[(sandbox.cgroup_id, external)] = call
        return call

    def _announce(self, sandbox: Sandbox, command: str, session: SessionId | None) -> ToolCallId:
        call = self._new_id()
        self._emit(
            ToolCallStarted(
                at_ns=self._now_ns(),
                id=call,
                sandbox=sandbox.cgroup_id,
                command=command,
                source=ToolCallSource.HOOK,
                confidence=HOOK_CONFIDENCE,
                session=session,
            )
        )
        if kept := self._kept.get(sandbox.cgroup_id):
            kept.announced.append(call)
        return call

    def _begin_process(
        self, sandbox: Sandbox, command: str, pid: int, wrapper_pid: int | None, session: SessionId | None
    ) -> ToolCallId:
        tag = self._probes.tag_of(pid) if self._probes else None
        seen = self._state.tool_calls.get(self._state.resolve(tag)) if tag is not None else None
        now_ns = self._now_ns()
        if seen is not None and seen.running and seen.pid == pid:
            self._emit(
                ToolCallAttributed(now_ns, seen.id, ToolCallSource.WRAPPER, WRAPPER_CONFIDENCE, command, session)
            )
            return seen.id
        if seen is not None and seen.running and seen.pid != wrapper_pid:
            return seen.id  # a wrapper inside a tool call: the outer boundaries stand
        budget = self._state.policy.memory.budget
        call = self._new_id()
        if self._probes is not None:
            self._probes.begin_tool(
                pid, sandbox.cgroup_id, tag=call, soft_bytes=budget.soft_bytes, hard_bytes=self._hard(budget.hard_bytes)
            )
        self._emit(
            ToolCallStarted(
                at_ns=now_ns,
                id=call,
                sandbox=sandbox.cgroup_id,
                command=command,
                source=ToolCallSource.WRAPPER,
                confidence=WRAPPER_CONFIDENCE,
                pid=pid,
                session=session,
                soft_bytes=budget.soft_bytes,
                hard_bytes=self._hard(budget.hard_bytes),
            )
        )
        if seen is not None and seen.running:
            self._emit(ToolCallMerged(now_ns, seen.id, call))
        return call

    def end(self, call: ToolCallId, exit_code: int | None = None, signal: int | None = None) -> None:
        """A wrapper or a hook says that a tool call has ended. One that has ended already stays as it is."""
        known = self._state.tool_calls.get(self._state.resolve(call))
        if known is None or not known.running:
            return
        peak = self._charged_peak(known.id)
        left = len(self.processes(known.id))
        self._emit(ToolCallEnded(self._now_ns(), known.id, exit_code, signal, escaped_count=left, peak_bytes=peak))
        if kept := self._kept.get(known.sandbox):
            kept.announced = [c for c in kept.announced if c != call]

    def external_call(self, external: str) -> ToolCallId | None:
        return next((call for (_, name), call in self._external.items() if name == external), None)

    def processes(self, call: ToolCallId) -> tuple[int, ...]:
        """Living processes of a tool call, escapees included."""
        if self._probes is not None and (pids := self._probes.processes(call)):
            return pids
        leaf = self._leaves.get(call)
        return self._cgroups.processes(leaf.path) if leaf else ()

    def _charged_peak(self, call: ToolCallId) -> int | None:
        """Without probes: the most that its leaf was charged, since polling misses what is short."""
        leaf = self._leaves.get(call) if self._probes is None else None
        return self._cgroups.memory_peak(leaf.path) if leaf else None

    def leaf(self, call: ToolCallId) -> str | None:
        """The tool call's own cgroup; None where it has none."""
        leaf = self._leaves.get(call)
        return leaf.path if leaf else None

    def _new_id(self) -> ToolCallId:
        if self._probes is not None:
            return self._probes.new_tag()
        return ToolCallId(int.from_bytes(os.urandom(8)) >> 1 | 1)

    def _hard(self, hard_bytes: int) -> int:
        """The hard budget to set: none where the policy only observes, since nobody would answer the call."""
        return hard_bytes if self._state.policy.enforce else 0

    # -- as a sink of the loop

    def __call__(self, event: Event, state: State) -> None:
        match event:
            case ToolCallStarted():
                if event.id in state.tool_calls:
                    self._on_started(event, state)
            case ToolCallEnded():
                self._on_ended(event.id, state)
            case ProcessesGone():
                # By its own id: a wrapper that was merged into its call takes its own leaf along, not the call's.
                self._on_gone(event.id, state)
            case _:
                pass

    def _on_started(self, event: ToolCallStarted, state: State) -> None:
        kept = self._kept.get(event.sandbox)
        if kept is None:
            return
        call = state.tool_calls[event.id]
        if event.source is ToolCallSource.LINEAGE and kept.announced:
            self._emit(ToolCallMerged(event.at_ns, kept.announced.pop(0), event.id))
        if event.pid is not None and kept.cgroup.own and event.id not in self._leaves:
            self._move_to_leaf(event.id, event.pid, kept.cgroup, event.sandbox)
        if event.pid is not None and self._probes is None:
            self._watch_root(event.id, event.pid)
        self._set_kind_budget(call, state)

    def _move_to_leaf(self, call: ToolCallId, pid: int, cgroup: SandboxCgroup, sandbox: CgroupId) -> None:
        """Give a call its own cgroup; children that were forked before the move follow."""
        try:
            path = self._cgroups.create_tool_leaf(cgroup.path, call)
        except CgroupError as error:
            log.warning("tool_leaf_failed", call=f"{call:016x}", error=str(error))
            return
        self._leaves[call] = _Leaf(path, sandbox)
        joined = self._cgroups.attach(pid, path)
        if self._probes is not None:
            for child in self._probes.processes(call):
                if child != pid:
                    self._cgroups.attach(child, path)
        if not joined.done and not self._cgroups.processes(path):
            self._drop_leaf(call)  # it was over before we could move it

    def _watch_root(self, call: ToolCallId, pid: int) -> None:
        """Without probes: nothing else tells that a call has ended whose wrapper was killed."""
        pidfd = self._watch(pid, lambda: self._root_gone(call))
        if pidfd is not None:
            self._roots[call] = pidfd

    def _root_gone(self, call: ToolCallId) -> None:
        self._unwatch(self._roots.pop(call, None))
        # Its wrapper knows the exit code and says it within milliseconds; then the call has ended already.
        asyncio.get_running_loop().call_later(REPORT_GRACE_S, self.end, call)

    def _set_kind_budget(self, call: ToolCall, state: State) -> None:
        budget = state.policy.memory.budget_for(call.kind)
        hard = self._hard(max(budget.hard_bytes, min(call.expected_bytes or 0, state.policy.memory.max_bytes)))
        if call.pid is None or (budget.soft_bytes, hard) == (call.soft_bytes, call.hard_bytes):
            return
        if self._probes is not None:
            try:
                self._probes.set_budget(call.id, soft_bytes=budget.soft_bytes, hard_bytes=hard)
            except EbpfError:
                return  # it has ended meanwhile
        self._emit(BudgetChanged(self._now_ns(), call.id, budget.soft_bytes, hard))

    def _on_ended(self, call: ToolCallId, state: State) -> None:
        known = state.tool_calls.get(call)
        if known is not None and known.gone_ns is not None:
            self._drop_leaf(call)

    def _on_gone(self, call: ToolCallId, state: State) -> None:
        self._drop_leaf(call)
        known = state.tool_calls.get(state.resolve(call))
        kept = self._kept.get(known.sandbox) if known else None
        if known is not None and kept is not None and kept.pidfd is None and kept.agent_tag is not None:
            self._remove_unless_used(known.sandbox)  # the agent has gone before its last escapee

    def _drop_leaf(self, call: ToolCallId) -> None:
        peak = self._charged_peak(call)
        leaf = self._leaves.pop(call, None)
        if leaf is None:
            return
        if peak is not None:
            self._emit(ToolCallMemoryStepped(self._now_ns(), call, 0, peak))
        self._cgroups.forget(leaf.path)
        removed = self._cgroups.remove(leaf.path, patience_s=0.0)
        if not removed.done and removed.detail:
            # A zombie of it is not reaped yet, or an escapee lives on: the sandbox's removal takes it along.
            log.debug("tool_leaf_left", problem=removed.detail)

    # -- process ends

    def _watch(self, pid: int, on_exit: Callable[[], None]) -> int | None:
        """Call `on_exit` once when the process exits; answers the descriptor that watches. None: it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            asyncio.get_running_loop().call_soon(on_exit)
            return None
        asyncio.get_running_loop().add_reader(pidfd, on_exit)
        return pidfd

    @staticmethod
    def _unwatch(pidfd: int | None) -> None:
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
