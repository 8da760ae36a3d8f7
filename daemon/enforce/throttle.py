"""Throttle: slow a tool call down through its own cgroup, and give it its old limit back.

Owns the choice of the limit: memory.high, or a CPU quota where the layout has nothing like it (v1).
"""

from __future__ import annotations

from pathlib import Path

from ...policies.actions import Throttle
from ...policies.model import DecisionId
from ..observe.journal import Hold, HoldCause, HoldKind, Needs
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect, Limit
from .rung import NO_TIER, Deed, Means, Rung
from .targets import Target

MEMORY_HIGH = HoldKind("memory.high", Needs(restore=True))
CPU_QUOTA = HoldKind("cpu quota", Needs(restore=True))
CAUSE = HoldCause("throttle")
_LIMITS = {MEMORY_HIGH: Limit.MEMORY_HIGH, CPU_QUOTA: Limit.CPU_QUOTA}


def _throttle(means: Means, target: Target, decision: DecisionId, action: Throttle) -> Applied:
    leaf, driver = target.leaf, means.driver
    if leaf is None or driver is None:
        return Applied(Effect.UNAVAILABLE, NO_TIER, "the call has no cgroup of its own to throttle")
    kind = MEMORY_HIGH
    before = driver.limit(leaf, _LIMITS[kind])
    if before is None:
        kind = CPU_QUOTA
        before = driver.limit(leaf, _LIMITS[kind])
    if before is None:
        gone = driver.cgroup_id(leaf) is None
        tier = driver.tier_of(_LIMITS[kind])
        return Applied(Effect.GONE if gone else Effect.UNAVAILABLE, tier, f"{leaf}: cannot be read")
    hold = means.hold_cgroup(decision, target, kind, CAUSE, leaf, action.expires_ns, restore=before)
    if kind is MEMORY_HIGH:
        result = driver.set_memory_high(leaf, action.high_bytes)
    else:
        result = driver.set_cpu_quota(leaf, action.cpu_ratio)
    return means.settle(hold, result)


def _restore(hold: Hold, driver: CgroupDriver | None, proc_root: Path) -> Applied:
    assert driver is not None and hold.path is not None
    return driver.restore(hold.path, _LIMITS[hold.kind], hold.restore or "max")


RUNG = Rung(
    deeds=(Deed(Throttle, _throttle),),
    undoes={MEMORY_HIGH: _restore, CPU_QUOTA: _restore},
    limits=_LIMITS,
)
