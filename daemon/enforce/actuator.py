"""Carrying out what was decided about tool calls: throttle, freeze, thaw, grant, wait, kill.

Owns the order of deed and record: what holds something back is in the journal before it is done, and struck out after
it is undone; every hold expires. Decides nothing. A tool call with a cgroup leaf of its own is controlled through the
leaf; any other by signals to exactly its processes, checked by start time, and never to its agent.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...policies.actions import (
    Decision,
    Freeze,
    Grant,
    Kill,
    Outcome,
    OutcomeStatus,
    Thaw,
    Throttle,
    ToolCallAction,
    Wait,
)
from ...policies.events import BudgetLevel, BudgetReached
from ...policies.model import MIB, NS_PER_S, DecisionId, ToolCallId
from .. import log
from ..errors import JournalError
from ..observe.journal.hold import Hold, HoldCause, HoldKind
from ..sandboxes import processes
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect, Limit
from ..sandboxes.processes import PROC, SIGNAL_TIER, ProcessRef
from .holds import Holds, undo

LONGEST_HOLD_NS = 120 * NS_PER_S
"""No hold lasts longer, whatever an action says: memory.high below a working set stalls for good without swap."""
UNANSWERED_NS = 60 * NS_PER_S
"""A call that the kernel stopped goes on after this if nothing was decided about it at all."""
WAIT_GRACE_NS = NS_PER_S // 2
"""Past the end of a wait, so that the policy's own verdict at that moment comes first."""
_RETRY_NS = NS_PER_S
_STOP_PASSES = 8
_KILL_PASSES = 50
_KILL_PAUSE_S = 0.001
NO_TIER = "none"

_STATUS = {
    Effect.DONE: OutcomeStatus.COMPLETED,
    Effect.PARTIAL: OutcomeStatus.CLIPPED,
    Effect.GONE: OutcomeStatus.GONE,
    Effect.UNAVAILABLE: OutcomeStatus.REJECTED,
    Effect.FAILED: OutcomeStatus.FAILED,
}


class Budgets(Protocol):
    """Where budgets are enforced: the kernel (ebpf), or user space (`fallback_budget`).

    A tool call that it does not know raises LookupError.
    """

    def set_budget(self, tag: ToolCallId, /, *, soft_bytes: int, hard_bytes: int) -> None:
        """0: none. Continues nobody."""
        ...

    def processes(self, tag: ToolCallId, /) -> tuple[int, ...]:
        """Its living processes, escapees included; empty where it is not known."""
        ...

    def resume(self, tag: ToolCallId, /) -> int:
        """Continue those that were stopped at a budget; answers how many processes."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tool call is, as far as it is known."""

    tool_call: ToolCallId
    leaf: str | None = None
    """Its own cgroup; None: it shares its agent's."""
    root: ProcessRef | None = None
    agent_pid: int | None = None
    hard_bytes: int = 0


class Actuator:
    """Executes tool-call actions. One thread; no method raises for what the kernel or the journal says."""

    def __init__(
        self,
        holds: Holds,
        driver: CgroupDriver | None,
        budgets: Budgets | None,
        *,
        budget_tier: str = "kernel budget",
        now_ns: Callable[[], int] = time.monotonic_ns,
        proc_root: Path = PROC,
    ) -> None:
        self.failed_count = 0
        self._holds = holds
        self._driver = driver
        self._budgets = budgets
        self._budget_tier = budget_tier
        self._now_ns = now_ns
        self._proc_root = proc_root
        self._targets: dict[ToolCallId, Target] = {}
        self._aliases: dict[ToolCallId, ToolCallId] = {}
        self._retry_ns: dict[int, int] = {}

    # -- what there is to act on

    def bind(
        self,
        tool_call: ToolCallId,
        *,
        leaf: str | None = None,
        pid: int | None = None,
        agent_pid: int | None = None,
        hard_bytes: int | None = None,
    ) -> None:
        """Say where a tool call is; called again, it adds what was not known. Before the first action on it."""
        known = self._target(tool_call)
        root = processes.identify(pid, self._proc_root) if pid is not None else None
        self._targets[known.tool_call] = replace(
            known,
            leaf=leaf if leaf is not None else known.leaf,
            root=root or known.root,
            agent_pid=agent_pid if agent_pid is not None else known.agent_pid,
            hard_bytes=hard_bytes if hard_bytes is not None else known.hard_bytes,
        )

    def merge(self, tool_call: ToolCallId, into: ToolCallId) -> None:
        """Both ids mean `into` from now on; its leaf and root process come along where `into` has none."""
        if tool_call == into:
            return
        known, target = self._targets.pop(tool_call, Target(tool_call)), self._target(into)
        self._aliases[tool_call] = target.tool_call
        self._targets[target.tool_call] = replace(
            target,
            leaf=target.leaf or known.leaf,
            root=target.root or known.root,
            agent_pid=target.agent_pid or known.agent_pid,
            hard_bytes=max(target.hard_bytes, known.hard_bytes),
        )

    def unbind(self, tool_call: ToolCallId) -> None:
        """Forget a tool call whose processes are gone; whatever still holds it is undone."""
        target = self._target(tool_call)
        self._holds.undo(self._of(target))
        self._targets.pop(target.tool_call, None)
        self._aliases = {old: new for old, new in self._aliases.items() if target.tool_call not in (old, new)}

    def arm(self, sandbox: str) -> bool:
        """Before budgets are set in a sandbox: write down that the kernel may stop its processes. Idempotent.

        False: the journal refused, so set no hard budget there.
        """
        if any(h.kind is HoldKind.ARMED and h.path == sandbox for h in self._holds.all()):
            return True
        try:
            self._holds.take(Hold(HoldKind.ARMED, HoldCause.BUDGET, self._now_ns(), None, path=sandbox))
        except JournalError as error:
            self._failed("arm", error)
            return False
        return True

    def disarm(self, sandbox: str) -> None:
        """When the sandbox goes: continue what is still stopped in it, and strike it out."""
        self._holds.undo(h for h in self._holds.all() if h.kind is HoldKind.ARMED and h.path == sandbox)

    def stopped_at_budget(self, event: BudgetReached) -> None:
        """Note that the kernel stopped a process, so that it goes on in the end even if nobody decides."""
        process = processes.identify(event.pid, self._proc_root)
        if event.level is not BudgetLevel.HARD or process is None:
            return
        target = replace(self._target(event.id), hard_bytes=event.budget_bytes)
        self._targets[target.tool_call] = target
        if any(h.process == process for h in self._of(target, HoldCause.BUDGET)):
            return
        now_ns = self._now_ns()
        hold = Hold(
            HoldKind.STOP,
            HoldCause.BUDGET,
            now_ns,
            now_ns + UNANSWERED_NS,
            tool_call=target.tool_call,
            process=process,
        )
        try:
            self._holds.take(hold)
        except JournalError as error:
            self._failed("stopped_at_budget", error)  # the sandbox is armed in the journal all the same

    # -- acting

    def execute(self, decision: Decision) -> Outcome:
        """Carry out a decision about a tool call. Raises TypeError for one about an engine."""
        action = decision.action
        if not isinstance(action, ToolCallAction):
            raise TypeError(f"{type(action).__name__} is for an engine")
        target = self._target(action.tool_call)
        expires_ns = getattr(action, "expires_ns", None)
        if expires_ns is not None and expires_ns <= self._now_ns():
            return self._outcome(decision, OutcomeStatus.EXPIRED, NO_TIER, "its expiry had passed before it was done")
        try:
            match action:
                case Throttle():
                    result = self._throttle(decision.id, target, action)
                case Freeze():
                    result = self._freeze(decision.id, target, action.expires_ns)
                case Thaw():
                    result = self._thaw(target)
                case Grant():
                    result = self._grant(target, action)
                case Wait():
                    result = self._wait(decision.id, target, action)
                case Kill():
                    result = self._kill(target)
        except JournalError as error:
            result = Applied(Effect.FAILED, "journal", f"not done, since it could not be written down: {error}")
        status = _STATUS[result.effect]
        if status is OutcomeStatus.FAILED:
            self._failed(type(action).__name__, result.detail)
        elif status is OutcomeStatus.COMPLETED and expires_ns is not None and self._cap(expires_ns) != expires_ns:
            status = OutcomeStatus.CLIPPED
            result = replace(result, detail=f"held for at most {LONGEST_HOLD_NS / NS_PER_S:g} s")
        return self._outcome(decision, status, result.tier, result.detail)

    def expire(self, now_ns: int) -> tuple[Outcome, ...]:
        """Undo what is due. One Outcome (EXPIRED) a decision; a failed undo is tried again a second later.

        Call it after the policy has decided: at the end of a wait its verdict goes first.
        """
        due = [h for h in self._holds.due(now_ns) if self._retry_ns.get(h.id or 0, 0) <= now_ns]
        if not due:
            return ()
        tiers: dict[DecisionId, str] = {}
        for call in {h.tool_call for h in due if h.cause is HoldCause.BUDGET and h.tool_call is not None}:
            self._go_on(self._target(call))
        for hold, result in self._holds.undo(due):
            if result.effect is Effect.FAILED:
                self._retry_ns[hold.id or 0] = now_ns + _RETRY_NS
                self._failed("expire", result.detail)
                continue
            self._retry_ns.pop(hold.id or 0, None)
            log.event("hold_expired", kind=hold.kind, cause=hold.cause, target=hold.target)
            if hold.decision is not None:
                tiers.setdefault(hold.decision, result.tier or hold.kind.value)
        return tuple(
            Outcome(decision, OutcomeStatus.EXPIRED, now_ns, tier, "undone at its expiry")
            for decision, tier in tiers.items()
        )

    def release_all(self, *, ending: bool = False) -> int:
        """Undo every hold; answers how many could not be.

        While the daemon goes on, sandboxes stay armed in the journal, since the kernel may stop their calls again.
        """
        for target in tuple(self._targets.values()):
            if self._of(target, HoldCause.BUDGET):
                self._go_on(target, lift=True)
        armed = tuple(h for h in self._holds.all() if h.kind is HoldKind.ARMED)
        undone = self._holds.undo(h for h in self._holds.all() if ending or h.kind is not HoldKind.ARMED)
        failed = sum(1 for _, result in undone if result.effect is Effect.FAILED)
        if not ending:
            for hold in armed:
                failed += undo(hold, self._driver, self._proc_root).effect is Effect.FAILED
        return failed

    # -- each action

    def _throttle(self, decision: DecisionId, target: Target, action: Throttle) -> Applied:
        leaf, driver = target.leaf, self._driver
        if leaf is None or driver is None:
            return Applied(Effect.UNAVAILABLE, NO_TIER, "the call has no cgroup of its own to throttle")
        limit, kind = Limit.MEMORY_HIGH, HoldKind.MEMORY_HIGH
        before = driver.limit(leaf, limit)
        if before is None:
            limit, kind = Limit.CPU_QUOTA, HoldKind.CPU_QUOTA
            before = driver.limit(leaf, limit)
        if before is None:
            gone = driver.cgroup_id(leaf) is None
            return Applied(
                Effect.GONE if gone else Effect.UNAVAILABLE, driver.tier_of(limit), f"{leaf}: cannot be read"
            )
        hold = self._hold_path(decision, target, kind, HoldCause.THROTTLE, leaf, action.expires_ns, restore=before)
        if limit is Limit.MEMORY_HIGH:
            result = driver.set_memory_high(leaf, action.high_bytes)
        else:
            result = driver.set_cpu_quota(leaf, action.cpu_ratio)
        return self._settle(hold, result)

    def _freeze(self, decision: DecisionId, target: Target, expires_ns: int) -> Applied:
        if target.leaf is None or self._driver is None:
            return self._stop(decision, target, HoldCause.FREEZE, expires_ns)
        hold = self._hold_path(decision, target, HoldKind.FREEZE, HoldCause.FREEZE, target.leaf, expires_ns)
        return self._settle(hold, self._driver.freeze(target.leaf))

    def _thaw(self, target: Target) -> Applied:
        undone = self._holds.undo(self._of(target, HoldCause.THROTTLE, HoldCause.FREEZE))
        if not undone:
            return Applied(Effect.GONE, NO_TIER, "nothing held it back any more")
        results = [result for _, result in undone]
        return next((r for r in results if r.effect is Effect.FAILED), results[0])

    def _grant(self, target: Target, action: Grant) -> Applied:
        if self._budgets is None:
            return Applied(Effect.UNAVAILABLE, NO_TIER, "no budgets are enforced on this host")
        try:
            self._budgets.set_budget(target.tool_call, soft_bytes=action.soft_bytes, hard_bytes=action.hard_bytes)
            count = self._budgets.resume(target.tool_call)
        except LookupError:
            self._holds.undo(self._of(target, HoldCause.BUDGET))
            return Applied(Effect.GONE, self._budget_tier, "the tool call has ended")
        self._targets[target.tool_call] = replace(target, hard_bytes=action.hard_bytes)
        # resume() continued every process, one stopped for a freeze by signal included.
        self._holds.forget(h for h in self._of(target) if h.kind is HoldKind.STOP)
        return Applied(
            Effect.DONE, self._budget_tier, f"{action.hard_bytes // MIB} MiB; {count} processes go on", count
        )

    def _wait(self, decision: DecisionId, target: Target, action: Wait) -> Applied:
        """It is stopped already: what is new is when that ends."""
        expires_ns = self._cap(action.expires_ns) + WAIT_GRACE_NS
        standing = self._of(target, HoldCause.BUDGET)
        for hold in standing:
            self._holds.extend(replace(hold, decision=decision), expires_ns)
        if not standing:
            stopped = [r for r in self._processes(target) if (s := processes.look(r, self._proc_root)) and s.stopped]
            if not stopped:
                return Applied(Effect.GONE, self._budget_tier, "no process of it is stopped")
            self._holds.take(*(self._stop_hold(decision, target, HoldCause.BUDGET, expires_ns, r) for r in stopped))
        return Applied(Effect.DONE, self._budget_tier)

    def _kill(self, target: Target) -> Applied:
        result = Applied(Effect.GONE, SIGNAL_TIER, "no process of it is left")
        if target.leaf is not None and self._driver is not None:
            result = self._driver.kill(target.leaf)
        killed: set[ProcessRef] = set()
        refused = ""
        for _ in range(_KILL_PASSES):
            # Those outside of the leaf; again and again, since they fork while we list them.
            fresh = [r for r in self._processes(target) if r not in killed]
            if not fresh:
                break
            for process in fresh:
                sent = processes.send(process, signal.SIGKILL, self._proc_root)
                refused = refused or (sent.detail if sent.effect is Effect.FAILED else "")
                killed.add(process)
            time.sleep(_KILL_PAUSE_S)
        self._holds.undo(self._of(target))
        if refused:
            return Applied(Effect.FAILED, SIGNAL_TIER, refused)
        if result.done and result.count:
            return replace(result, detail=f"{result.count} processes")
        if killed:
            return Applied(Effect.DONE, SIGNAL_TIER, f"{len(killed)} processes", len(killed))
        return Applied(Effect.GONE, result.tier, "no process of it is left")

    # -- inside

    def _go_on(self, target: Target, *, lift: bool = False) -> None:
        """End a stop at a budget without a verdict: half as much again, so that a runaway still meets a budget."""
        if self._budgets is None:
            return
        hard_bytes = 0 if lift else target.hard_bytes * 3 // 2
        try:
            self._budgets.set_budget(target.tool_call, soft_bytes=0, hard_bytes=hard_bytes)
            self._budgets.resume(target.tool_call)
        except LookupError:
            return  # it ended
        if target.tool_call in self._targets:
            self._targets[target.tool_call] = replace(target, hard_bytes=hard_bytes)

    def _stop(self, decision: DecisionId, target: Target, cause: HoldCause, expires_ns: int) -> Applied:
        stopped: set[ProcessRef] = set()
        for _ in range(_STOP_PASSES):
            fresh = [r for r in self._processes(target) if r not in stopped]
            if not fresh:
                break
            holds = self._holds.take(
                *(self._stop_hold(decision, target, cause, self._cap(expires_ns), r) for r in fresh)
            )
            for process, hold in zip(fresh, holds, strict=True):
                result = processes.send(process, signal.SIGSTOP, self._proc_root)
                if result.effect is Effect.FAILED:
                    self._holds.undo(self._of(target, cause))
                    return result
                if not result.done:
                    self._holds.forget([hold])
                stopped.add(process)
        if not stopped:
            return Applied(Effect.GONE, SIGNAL_TIER, "no process of it is left")
        return Applied(Effect.DONE, SIGNAL_TIER, f"{len(stopped)} processes", len(stopped))

    def _processes(self, target: Target) -> tuple[ProcessRef, ...]:
        """Living processes of the call, never its agent nor us. Listed twice: a pid reused in between drops out."""
        refs = [r for pid in self._pids(target) if (r := processes.identify(pid, self._proc_root)) is not None]
        if not refs:
            return ()
        still = set(self._pids(target)) - {target.agent_pid, os.getpid(), os.getppid(), 0, 1}
        return tuple(r for r in refs if r.pid in still)

    def _pids(self, target: Target) -> tuple[int, ...]:
        found: set[int] = set()
        if self._budgets is not None:
            found.update(self._budgets.processes(target.tool_call))
        if target.leaf is not None and self._driver is not None:
            found.update(self._driver.processes(target.leaf))
        if not found and target.root is not None and processes.look(target.root, self._proc_root) is not None:
            found.update(processes.descendants(target.root.pid, self._proc_root))
        return tuple(sorted(found))

    def _hold_path(
        self,
        decision: DecisionId,
        target: Target,
        kind: HoldKind,
        cause: HoldCause,
        path: str,
        expires_ns: int,
        *,
        restore: str | None = None,
    ) -> Hold:
        """The hold on a cgroup, written down. One that stands is extended and keeps what it restores."""
        expires_ns = self._cap(expires_ns)
        standing = next((h for h in self._of(target, cause) if h.kind is kind and h.path == path), None)
        if standing is not None:
            return self._holds.extend(replace(standing, decision=decision), expires_ns)
        now_ns = self._now_ns()
        hold = Hold(kind, cause, now_ns, expires_ns, target.tool_call, decision, path, restore=restore)
        return self._holds.take(hold)[0]

    def _stop_hold(
        self, decision: DecisionId, target: Target, cause: HoldCause, expires_ns: int, process: ProcessRef
    ) -> Hold:
        now_ns = self._now_ns()
        return Hold(HoldKind.STOP, cause, now_ns, expires_ns, target.tool_call, decision, process=process)

    def _settle(self, hold: Hold, result: Applied) -> Applied:
        """A deed that did not come to pass holds nothing back."""
        if not result.done:
            self._holds.undo([hold])
        return result

    def _target(self, tool_call: ToolCallId) -> Target:
        tool_call = self._aliases.get(tool_call, tool_call)
        return self._targets.get(tool_call) or Target(tool_call)

    def _of(self, target: Target, *causes: HoldCause) -> tuple[Hold, ...]:
        ids = (target.tool_call, *(old for old, new in self._aliases.items() if new == target.tool_call))
        return tuple(h for i in ids for h in self._holds.of(i, *causes))

    def _cap(self, expires_ns: int) -> int:
        return min(expires_ns, self._now_ns() + LONGEST_HOLD_NS)

    def _outcome(self, decision: Decision, status: OutcomeStatus, tier: str, detail: str) -> Outcome:
        now_ns = self._now_ns()
        since_ns = decision.trigger_ns if decision.trigger_ns is not None else decision.at_ns
        return Outcome(decision.id, status, now_ns, tier, detail, max(0, now_ns - since_ns))

    def _failed(self, what: str, detail: str | JournalError) -> None:
        self.failed_count += 1
        log.warning("action_failed", action=what, detail=str(detail))
