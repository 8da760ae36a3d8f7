"""Kill: end a tool call, its whole subtree, never its agent.

Owns no kind of hold: it is final, and undoes what held the call.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace

from ...policies.actions import Kill
from ...policies.model import DecisionId
from ..sandboxes import processes
from ..sandboxes.cgroups import Applied, Effect
from ..sandboxes.processes import SIGNAL_TIER, ProcessRef
from .rung import Deed, Means, Rung
from .targets import Target

_PASSES = 50
_PAUSE_S = 0.001


def _kill(means: Means, target: Target, decision: DecisionId, action: Kill) -> Applied:
    result = Applied(Effect.GONE, SIGNAL_TIER, "no process of it is left")
    if target.leaf is not None and means.driver is not None:
        result = means.driver.kill(target.leaf)
    killed: set[ProcessRef] = set()
    refused = ""
    for _ in range(_PASSES):
        # Those outside of the leaf; again and again, since they fork while we list them.
        fresh = [r for r in means.targets.processes(target) if r not in killed]
        if not fresh:
            break
        for process in fresh:
            sent = processes.send(process, signal.SIGKILL, means.proc_root)
            refused = refused or (sent.detail if sent.effect is Effect.FAILED else "")
            killed.add(process)
        time.sleep(_PAUSE_S)
    means.holds.undo(means.of(target))
    if refused:
        return Applied(Effect.FAILED, SIGNAL_TIER, refused)
    if result.done and result.count:
        return replace(result, detail=f"{result.count} processes")
    if killed:
        return Applied(Effect.DONE, SIGNAL_TIER, f"{len(killed)} processes", len(killed))
    return Applied(Effect.GONE, result.tier, "no process of it is left")


RUNG = Rung(deeds=(Deed(Kill, _kill),))
