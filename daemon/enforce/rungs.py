"""The registry of rungs: who carries out which action, and who undoes which kind of hold.

Owns the one table that a new rung is entered in, and the two dispatches over it: the actuator does by it; the guardian,
`equipoise release` and the next start undo by it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...policies.actions import ToolCallAction
from ...policies.model import DecisionId
from ..observe.journal import Hold
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect, Limit
from ..sandboxes.processes import PROC
from . import freeze, kill, stop, throttle
from .rung import Means
from .targets import Target

RUNGS = (
    throttle.RUNG,
    freeze.RUNG,
    stop.RUNG,
    kill.RUNG,
)

_DEEDS: dict[type[ToolCallAction], Callable[[Means, Target, DecisionId, ToolCallAction], Applied]] = {
    deed.action: deed.do for rung in RUNGS for deed in rung.deeds
}
_UNDOES = {kind: (kind, undo) for rung in RUNGS for kind, undo in rung.undoes.items()}
_LIMITS = {kind: limit for rung in RUNGS for kind, limit in rung.limits.items()}


def do(means: Means, target: Target, decision: DecisionId, action: ToolCallAction) -> Applied:
    """Carry out one action. Raises JournalError, before anything is done."""
    return _DEEDS[type(action)](means, target, decision, action)


def undo(hold: Hold, driver: CgroupDriver | None, proc_root: Path = PROC) -> Applied:
    """Take one hold back, from its record alone.

    Idempotent; GONE where its cgroup or process is; FAILED for a record that no rung here can read. Never raises
    OSError.
    """
    found = _UNDOES.get(hold.kind)
    if found is None:
        return Applied(Effect.FAILED, hold.kind.value, f"{hold.target}: no rung here undoes {hold.kind.value!r}")
    kind, take_back = found
    try:
        hold.check(kind.needs)
    except ValueError as error:
        return Applied(Effect.FAILED, hold.kind.value, str(error))
    if hold.path is not None and driver is None:
        return Applied(Effect.FAILED, hold.kind.value, f"{hold.path}: no cgroups can be reached from here")
    return take_back(hold, driver, proc_root)


def limit_of(hold: Hold) -> Limit | None:
    """The limit of a cgroup that it is; None: it is none."""
    return _LIMITS.get(hold.kind)
