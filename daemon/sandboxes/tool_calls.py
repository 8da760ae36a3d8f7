"""Tool calls as they begin and end: their tags, their leaves, the ids that callers use.

Owns the bookkeeping between a call, its processes and whoever announced it. It applies no policy: budgets come from the
policy in force, verdicts from decide(). Without eBPF a call's boundaries come from wrappers and hooks alone, its memory
from its leaf's counter.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies.events import (
    BudgetChanged,
    Event,
    ProcessesGone,
    RoleObserved,
    SandboxRemoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallJoined,
    ToolCallLeft,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
    ToolCallWithdrawn,
)
from ...policies.model import CgroupId, Sandbox, SessionId, ToolCall, ToolCallId, ToolCallSource
from ...policies.state import State
from ..errors import Refusal, RegistrationRefused
from . import registering
from .cgroups import CgroupDriver
from .entry import EntryBudgets
from .kept import Book
from .leaves import Leaves
from .watch import unwatch, watch

WRAPPER_CONFIDENCE = 1.0
HOOK_CONFIDENCE = 0.95
"""A hook's boundaries are exact; which processes are meant is inferred from what is exec'd meanwhile."""
REMEMBERED = 10_000
"""Ids of announcers."""
REPORT_GRACE_S = 0.5
"""Without probes: how long after its root process has exited a wrapper may say with which exit code."""


class ToolCallKeeper:
    """Begins, follows and ends. Also a sink of the loop: `keeper(event, state)`."""

    def __init__(
        self,
        book: Book,
        entry: EntryBudgets,
        driver: CgroupDriver | None,
        probes: ToolMemory | None,
        state: State,
        emit: Callable[[Event], None],
        now_ns: Callable[[], int],
        sandbox_of: Callable[[int], Sandbox | None],
    ) -> None:
        """`sandbox_of(pid)` is the one that a process is in."""
        self._sandbox_of = sandbox_of
        self._book = book
        self._entry = entry
        self._probes = probes
        self._state = state
        self._emit = emit
        self._now_ns = now_ns
        self._leaves = Leaves(driver, probes.processes if probes is not None else None)
        self._roots: dict[ToolCallId, int] = {}
        """Without probes: a pidfd of the root process of each call."""
        self._external: OrderedDict[tuple[CgroupId, str], ToolCallId] = OrderedDict()
        """Calls by the ids of those who announced them, the newest."""
        self._earlier: Mapping[ToolCallId, ToolCallId] = {}

    def close(self) -> None:
        """Watch nothing any more; what runs goes on."""
        for pidfd in self._roots.values():
            unwatch(pidfd)
        self._roots.clear()

    def begin(
        self,
        sandbox: Sandbox,
        command: str,
        pid: int | None,
        wrapper_pid: int | None,
        external: str | None,
        session: SessionId | None,
    ) -> ToolCallId | None:
        """A wrapper or a hook says that a tool call begins. None: within one that runs, whose boundaries stand.

        Raises RegistrationRefused, ProcessLookupError, CgroupError, EbpfError; then none has begun.
        """
        if external and (known := self._external.get((sandbox.cgroup_id, external))) is not None:
            return self._state.resolve(known)
        if pid is not None:
            self._check(sandbox, pid)
        if pid is not None:
            call = self._begin_process(sandbox, command, pid, wrapper_pid, session)
        else:
            call = self._announce(sandbox, command, session, external)
        if external and call is not None:
            self._remember(sandbox.cgroup_id, external, call)
        return call

    def take_up(self, calls: Iterable[ToolCall], merged: Mapping[ToolCallId, ToolCallId]) -> None:
        """What was announced to an earlier run: whoever announced it has its own id, or ours, to end it by.

        `merged`: announcements, and the calls that they became.
        """
        self._earlier = merged
        for call in calls:
            if call.call_id is not None:
                self._remember(call.sandbox, call.call_id, call.id)
            if (
                call.running
                and call.pid is None
                and call.source is ToolCallSource.HOOK
                and (kept := self._book.get(call.sandbox))
            ):
                kept.announced.append(call.id)

    def _remember(self, sandbox: CgroupId, external: str, call: ToolCallId) -> None:
        self._external[sandbox, external] = call
        if len(self._external) > REMEMBERED:
            self._external.popitem(last=False)

    def resolve(self, call: ToolCallId) -> ToolCallId:
        """The call that an announcement of this run, or of an earlier one, is known as now."""
        return self._state.resolve(self._earlier.get(call, call))

    def _check(self, sandbox: Sandbox, pid: int) -> None:
        root = registering.check_process(pid)
        kept = self._book.get(sandbox.cgroup_id)
        if kept is not None and root == kept.agent:
            raise RegistrationRefused(
                Refusal.FORBIDDEN, f"pid {pid} is the agent of {sandbox.label}: give the process that it started"
            )
        registering.check_free(pid, self._sandbox_of(pid), sandbox.label)

    def _announce(self, sandbox: Sandbox, command: str, session: SessionId | None, external: str | None) -> ToolCallId:
        call = self.new_id()
        self._emit(
            ToolCallStarted(
                at_ns=self._now_ns(),
                id=call,
                sandbox=sandbox.cgroup_id,
                command=command,
                source=ToolCallSource.HOOK,
                confidence=HOOK_CONFIDENCE,
                session=session,
                call_id=external,
            )
        )
        if kept := self._book.get(sandbox.cgroup_id):
            kept.announced.append(call)
        return call

    def _begin_process(
        self, sandbox: Sandbox, command: str, pid: int, wrapper_pid: int | None, session: SessionId | None
    ) -> ToolCallId | None:
        tag = self._probes.tag_of(pid) if self._probes else None
        seen = self._state.tool_calls.get(self._state.resolve(tag)) if tag is not None else None
        now_ns = self._now_ns()
        if seen is not None and seen.running and seen.pid == pid:
            self._emit(
                ToolCallAttributed(now_ns, seen.id, ToolCallSource.WRAPPER, WRAPPER_CONFIDENCE, command, session)
            )
            return seen.id
        if seen is not None and seen.running and seen.pid != wrapper_pid:
            return None  # a wrapper inside a tool call
        budget = self._entry.of(self._state.policy.memory.budget)
        call = self.new_id()
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
        """A wrapper or a hook says that a tool call has ended. Of one that has, only what nobody knew is taken: how."""
        known = self._state.tool_calls.get(self.resolve(call))
        if known is None:
            return
        if not known.running:
            if exit_code is not None or signal is not None:
                self._emit(ToolCallEnded(self._now_ns(), known.id, exit_code, signal))
            return
        peak = self._charged_peak(known.id)
        left = len(self.processes(known.id))
        self._emit(ToolCallEnded(self._now_ns(), known.id, exit_code, signal, escaped_count=left, peak_bytes=peak))
        if kept := self._book.get(known.sandbox):
            kept.announced = [c for c in kept.announced if c not in (call, known.id)]

    def external_calls(self, external: str) -> dict[CgroupId, ToolCallId]:
        """By sandbox: the calls that were announced under that id."""
        return {sandbox: call for (sandbox, name), call in self._external.items() if name == external}

    def processes(self, call: ToolCallId) -> tuple[int, ...]:
        """Living processes of a tool call, escapees included."""
        if self._probes is not None and (pids := self._probes.processes(call)):
            return pids
        return self._leaves.processes(call)

    def _charged_peak(self, call: ToolCallId) -> int | None:
        """Without probes: the most that its leaf was charged, since polling misses what is short."""
        return self._leaves.charged_peak(call) if self._probes is None else None

    def leaf(self, call: ToolCallId) -> str | None:
        """The tool call's own cgroup; None where it has none."""
        return self._leaves.path(call)

    def new_id(self) -> ToolCallId:
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
            case ToolCallJoined() | ToolCallLeft():
                self._move(event, state)
            case ToolCallEnded():
                self._on_ended(event.id, state)
            case ProcessesGone():
                # By its own id: a wrapper that was merged into its call takes its own leaf along, not the call's.
                self._drop_leaf(event.id)
                known = state.tool_calls.get(event.id)
                if known is not None and known.running:
                    # Its root left without an exit that the kernel told of: nobody will say how it ended.
                    self._emit(ToolCallEnded(self._now_ns(), event.id, None, None))
            case ToolCallWithdrawn():
                if not self._leaves.processes(event.id):
                    self._leaves.drop(event.id)
            case RoleObserved(process=process) if process.gone:
                self._leaves.drop(process.id)  # it had one while it passed for a call
            case SandboxRemoved():
                self._end_what_nobody_will(event.cgroup_id, state)
                self._leaves.forget(event.cgroup_id)
                for key in [key for key in self._external if key[0] == event.cgroup_id]:
                    del self._external[key]
            case _:
                pass

    def _end_what_nobody_will(self, sandbox: CgroupId, state: State) -> None:
        """Of a sandbox that goes: calls without a process, whose hook would say when they end, and can no more."""
        for call in [c for c in state.tool_calls.values() if c.sandbox == sandbox and c.running]:
            if call.id not in self._roots and not self.processes(call.id):
                self._emit(ToolCallEnded(self._now_ns(), call.id, None, None))

    def _on_started(self, event: ToolCallStarted, state: State) -> None:
        kept = self._book.get(event.sandbox)
        if kept is None:
            return
        call = state.tool_calls[event.id]
        if event.source is ToolCallSource.LINEAGE and kept.announced:
            self._emit(ToolCallMerged(event.at_ns, kept.announced.pop(0), event.id))
        if event.pid is not None:
            self._leaves.make(event.id, event.pid, kept.cgroup, event.sandbox)
        if event.pid is not None and self._probes is None:
            self._watch_root(event.id, event.pid)
        self._set_kind_budget(call)

    def _move(self, event: ToolCallJoined | ToolCallLeft, state: State) -> None:
        call = state.tool_calls.get(event.id)
        kept = self._book.get(call.sandbox) if call is not None else None
        if isinstance(event, ToolCallJoined):
            self._leaves.join(event.id, event.pid)
        elif kept is not None:
            self._leaves.leave(event.id, event.pid, kept.cgroup)

    def _watch_root(self, call: ToolCallId, pid: int) -> None:
        """Without probes: nothing else tells that a call has ended whose wrapper was killed."""
        pidfd = watch(pid, lambda: self._root_gone(call))
        if pidfd is not None:
            self._roots[call] = pidfd

    def _root_gone(self, call: ToolCallId) -> None:
        unwatch(self._roots.pop(call, None))
        # Its wrapper knows the exit code and says it within milliseconds; then the call has ended already.
        asyncio.get_running_loop().call_later(REPORT_GRACE_S, self.end, call)

    def _set_kind_budget(self, call: ToolCall) -> None:
        soft, hard = self.budget_of(call)
        if call.pid is None or call.exempt or (soft, hard) == (call.soft_bytes, call.hard_bytes):
            return
        if self._probes is not None:
            try:
                self._probes.set_budget(call.id, soft_bytes=soft, hard_bytes=hard)
            except EbpfError:
                return  # it has ended meanwhile
        self._emit(BudgetChanged(self._now_ns(), call.id, soft, hard))

    def keep_up(self) -> None:
        """At each turn: what calls begin with has changed, and so it has for those that have begun and not used it."""
        if not self._entry.keep_up():
            return
        for call in [c for c in self._state.tool_calls.values() if c.running and c.granted_ns is None]:
            if call.stopped_ns is None and call.used_bytes < self.budget_of(call)[1] // 2:
                self._set_kind_budget(call)

    def policy_applied(self) -> None:
        """Budgets of calls that run: the new ones, but none below what a call has come to unasked under the old."""
        for call in [c for c in self._state.tool_calls.values() if c.running and c.stopped_ns is None]:
            _, hard = self.budget_of(call)
            if not hard or hard >= call.hard_bytes or call.used_bytes < hard // 2:
                self._set_kind_budget(call)

    def budget_of(self, call: ToolCall) -> tuple[int, int]:
        """Soft and hard: what it begins with by the policy, and what it was granted; 0 where no budget may stop it."""
        if call.exempt:
            return 0, 0
        budget = self._entry.of_call(call)
        if call.granted_ns is not None and call.hard_bytes > budget.hard_bytes:
            return call.soft_bytes, self._hard(call.hard_bytes)
        return budget.soft_bytes, self._hard(budget.hard_bytes)

    def _on_ended(self, call: ToolCallId, state: State) -> None:
        known = state.tool_calls.get(call)
        if known is not None and known.gone_ns is not None:
            self._drop_leaf(call)

    def _drop_leaf(self, call: ToolCallId) -> None:
        peak = self._charged_peak(call)
        if peak is not None:
            self._emit(ToolCallMemoryStepped(self._now_ns(), call, 0, peak))
        self._leaves.drop(call)
