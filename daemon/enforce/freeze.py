"""Freeze a tool call and thaw it.

Owns the frozen cgroup; a call without one of its own is stopped by signals, on record as stop.py has it. A thaw lets go
of everything that a decision holds back, a throttle too, and leaves what stands at its budget.
"""

from __future__ import annotations

import signal
from pathlib import Path

from ...policies.actions import Freeze, Thaw
from ...policies.model import DecisionId
from ..observe.journal import Hold, HoldCause, HoldKind, Needs
from ..sandboxes import processes
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect
from ..sandboxes.processes import SIGNAL_TIER, ProcessRef
from .rung import NO_TIER, Deed, Means, Rung
from .stop import STOP
from .targets import Target

FREEZE = HoldKind("freeze", Needs())
"""A frozen cgroup."""
CAUSE = HoldCause("freeze")
_STOP_PASSES = 8


def _freeze(means: Means, target: Target, decision: DecisionId, action: Freeze) -> Applied:
    if target.leaf is None or means.driver is None:
        return _stop_processes(means, target, decision, action.expires_ns)
    hold = means.hold_cgroup(decision, target, FREEZE, CAUSE, target.leaf, action.expires_ns)
    return means.settle(hold, means.driver.freeze(target.leaf))


def _stop_processes(means: Means, target: Target, decision: DecisionId, expires_ns: int) -> Applied:
    stopped: set[ProcessRef] = set()
    for _ in range(_STOP_PASSES):
        fresh = [r for r in means.targets.processes(target) if r not in stopped]
        if not fresh:
            break
        at_ns, until_ns = means.now_ns(), means.cap(expires_ns)
        holds = means.holds.take(
            *(Hold(STOP, CAUSE, at_ns, until_ns, target.tool_call, decision, process=r) for r in fresh)
        )
        for process, hold in zip(fresh, holds, strict=True):
            result = processes.send(process, signal.SIGSTOP, means.proc_root)
            if result.effect is Effect.FAILED:
                means.holds.undo(means.of(target, CAUSE))
                return result
            if not result.done:
                means.holds.forget([hold])
            stopped.add(process)
    if not stopped:
        return Applied(Effect.GONE, SIGNAL_TIER, "no process of it is left")
    return Applied(Effect.DONE, SIGNAL_TIER, f"{len(stopped)} processes", len(stopped))


def _thaw(means: Means, target: Target, decision: DecisionId, action: Thaw) -> Applied:
    undone = means.holds.undo(h for h in means.of(target) if h.cause != HoldCause.BUDGET)
    if not undone:
        return Applied(Effect.GONE, NO_TIER, "nothing held it back any more")
    results = [result for _, result in undone]
    return next((r for r in results if r.effect is Effect.FAILED), results[0])


def _undo(hold: Hold, driver: CgroupDriver | None, proc_root: Path) -> Applied:
    assert driver is not None and hold.path is not None
    return driver.thaw(hold.path)


RUNG = Rung(deeds=(Deed(Freeze, _freeze), Deed(Thaw, _thaw)), undoes={FREEZE: _undo})
