"""Stopped at the budget: noted, answered by a grant or a wait, or let go on without a verdict.

Owns stopped processes on record, and sandboxes in which the kernel may stop some. The stop itself is the kernel's, or
`fallback_budget`'s; a freeze of a call without a cgroup stops its processes too, and records them as these.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

from ...policies.actions import Grant, Wait
from ...policies.events import BudgetLevel, BudgetReached
from ...policies.model import MIB, NS_PER_S, DecisionId
from ..observe.journal import Hold, HoldCause, HoldKind, Needs
from ..sandboxes import processes
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect
from ..sandboxes.processes import PROC, SIGNAL_TIER, ProcessRef
from .rung import NO_TIER, Deed, Means, Rung
from .targets import Target

STOP = HoldKind("stop", Needs(process=True))
"""A process stopped by SIGSTOP."""
UNANSWERED_NS = 60 * NS_PER_S
"""A call that the kernel stopped goes on after this if nothing was decided about it at all."""
WAIT_GRACE_NS = NS_PER_S // 2
"""Past the end of a wait, so that the policy's own verdict at that moment comes first."""


# -- what the kernel may do, and has done


def armed(means: Means, sandbox: str) -> tuple[Hold, ...]:
    """That the kernel may stop processes of this sandbox, as far as it is written down."""
    return tuple(h for h in means.holds.all() if h.kind == HoldKind.ARMED and h.path == sandbox)


def arm(means: Means, sandbox: str) -> None:
    """Write that down. Idempotent. Raises JournalError."""
    if not armed(means, sandbox):
        means.holds.take(Hold(HoldKind.ARMED, HoldCause.BUDGET, means.now_ns(), None, path=sandbox))


def note(means: Means, event: BudgetReached) -> None:
    """Write down that the kernel stopped a process. Raises JournalError: the sandbox is armed there all the same."""
    process = processes.identify(event.pid, means.proc_root)
    if event.level is not BudgetLevel.HARD or process is None:
        return
    target = replace(means.targets.find(event.id), hard_bytes=event.budget_bytes)
    means.targets.put(target)
    if any(h.process == process for h in means.of(target, HoldCause.BUDGET)):
        return
    at_ns = means.now_ns()
    hold = Hold(STOP, HoldCause.BUDGET, at_ns, at_ns + UNANSWERED_NS, tool_call=target.tool_call, process=process)
    means.holds.take(hold)


# -- how it ends


def _grant(means: Means, target: Target, decision: DecisionId, action: Grant) -> Applied:
    if means.budgets is None:
        return Applied(Effect.UNAVAILABLE, NO_TIER, "no budgets are enforced on this host")
    try:
        means.budgets.set_budget(target.tool_call, soft_bytes=action.soft_bytes, hard_bytes=action.hard_bytes)
        count = means.budgets.resume(target.tool_call)
    except LookupError:
        means.holds.undo(means.of(target, HoldCause.BUDGET))
        return Applied(Effect.GONE, means.budget_tier, "the tool call has ended")
    means.targets.put(replace(target, hard_bytes=action.hard_bytes))
    # resume() continued every process, one stopped for a freeze by signal included.
    means.holds.forget(h for h in means.of(target) if h.kind == STOP)
    return Applied(Effect.DONE, means.budget_tier, f"{action.hard_bytes // MIB} MiB; {count} processes go on", count)


def _wait(means: Means, target: Target, decision: DecisionId, action: Wait) -> Applied:
    """It is stopped already: what is new is when that ends."""
    expires_ns = means.cap(action.expires_ns) + WAIT_GRACE_NS
    standing = means.of(target, HoldCause.BUDGET)
    for hold in standing:
        means.holds.extend(replace(hold, decision=decision), expires_ns)
    if not standing:
        stopped = [r for r in means.targets.processes(target) if _is_stopped(r, means.proc_root)]
        if not stopped:
            return Applied(Effect.GONE, means.budget_tier, "no process of it is stopped")
        at_ns, call = means.now_ns(), target.tool_call
        means.holds.take(*(Hold(STOP, HoldCause.BUDGET, at_ns, expires_ns, call, decision, process=r) for r in stopped))
    return Applied(Effect.DONE, means.budget_tier)


def go_on(means: Means, target: Target, *, lift: bool = False) -> None:
    """End a stop at a budget without a verdict: half as much again, so that a runaway still meets a budget."""
    if means.budgets is None:
        return
    hard_bytes = 0 if lift else target.hard_bytes * 3 // 2
    try:
        means.budgets.set_budget(target.tool_call, soft_bytes=0, hard_bytes=hard_bytes)
        means.budgets.resume(target.tool_call)
    except LookupError:
        return  # it ended
    means.targets.put_known(replace(target, hard_bytes=hard_bytes))


# -- from the record alone


def _undo(hold: Hold, driver: CgroupDriver | None, proc_root: Path) -> Applied:
    assert hold.process is not None
    return processes.send(hold.process, signal.SIGCONT, proc_root)


def _undo_armed(hold: Hold, driver: CgroupDriver | None, proc_root: Path) -> Applied:
    assert driver is not None and hold.path is not None
    return continue_stopped(driver.processes(hold.path), proc_root)


def continue_stopped(pids: tuple[int, ...], proc_root: Path = PROC) -> Applied:
    """SIGCONT to those that are stopped. `count` is how many were."""
    continued, failed = 0, ""
    for pid in pids:
        found = processes.stat(pid, proc_root)
        if found is None or not found.stopped:
            continue
        result = processes.send(ProcessRef(pid, found.start_ticks), signal.SIGCONT, proc_root)
        continued += result.count
        failed = failed or (result.detail if result.effect is Effect.FAILED else "")
    return Applied(Effect.FAILED if failed else Effect.DONE, SIGNAL_TIER, failed, continued)


def _is_stopped(ref: ProcessRef, proc_root: Path) -> bool:
    found = processes.look(ref, proc_root)
    return found is not None and found.stopped


RUNG = Rung(deeds=(Deed(Grant, _grant), Deed(Wait, _wait)), undoes={STOP: _undo, HoldKind.ARMED: _undo_armed})
