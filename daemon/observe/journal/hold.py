"""What the journal records of something that is held back.

Owns the fact `Hold`. It says enough to be undone from the record alone, by whoever comes after a `kill -9` of the
daemon. Must not: undo anything, or know who holds back what (enforce/).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ....policies.model import DecisionId, ToolCallId
from ...sandboxes.cgroups import Limit
from ...sandboxes.processes import ProcessRef


class HoldKind(Enum):
    MEMORY_HIGH = "memory.high"
    CPU_QUOTA = "cpu quota"
    FREEZE = "freeze"
    """A frozen cgroup."""
    STOP = "stop"
    """A process stopped by SIGSTOP."""
    ARMED = "armed"
    """The kernel may stop processes of this cgroup at a budget. Holds nothing back by itself, so it never expires;
    undoing it continues whatever is stopped there."""


class HoldCause(Enum):
    THROTTLE = "throttle"
    FREEZE = "freeze"
    BUDGET = "budget"
    """Stopped at its hard budget: until a grant, a kill, or the end of its wait."""


LIMITS = {HoldKind.MEMORY_HIGH: Limit.MEMORY_HIGH, HoldKind.CPU_QUOTA: Limit.CPU_QUOTA}
"""The kinds of hold that are limits."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One thing that is held back.

    Invariants: everything but ARMED expires; STOP names a process, the others a cgroup; a limit knows its old text.
    """

    kind: HoldKind
    cause: HoldCause
    at_ns: int
    expires_ns: int | None
    tool_call: ToolCallId | None = None
    decision: DecisionId | None = None
    path: str | None = None
    """Of the cgroup, relative to the hierarchy's root."""
    process: ProcessRef | None = None
    restore: str | None = None
    """The limit as it was."""
    id: int | None = None
    """Given by the journal; None: not written yet."""

    def __post_init__(self) -> None:
        if (self.expires_ns is None) != (self.kind is HoldKind.ARMED):
            raise ValueError(f"a hold of kind {self.kind.value} with expires_ns={self.expires_ns}")
        if (self.process is None) == (self.kind is HoldKind.STOP) or (self.path is None) != (self.process is not None):
            raise ValueError(f"a hold of kind {self.kind.value} on path={self.path} process={self.process}")
        if (self.restore is None) == (self.kind in LIMITS):
            raise ValueError(f"a hold of kind {self.kind.value} with restore={self.restore}")

    @property
    def target(self) -> str:
        return self.path if self.path is not None else f"pid {self.process.pid if self.process else '?'}"

    def same_target(self, other: Hold) -> bool:
        """Whether undoing one would undo the other."""
        return self.kind is other.kind and self.path == other.path and self.process == other.process
