"""The shape of a rung of the host-memory ladder, and what every rung acts with.

Owns the order of deed and record: what holds something back is in the journal before it is done, and struck out where
it did not come to pass; every hold expires. Must not: know any rung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ...policies.actions import ToolCallAction
from ...policies.model import NS_PER_S, DecisionId
from ..observe.journal import Hold, HoldCause, HoldKind
from ..sandboxes.cgroups import Applied, CgroupDriver, Limit
from .targets import Budgets, Target, Targets

if TYPE_CHECKING:  # a name in annotations only: Holds undoes by the rungs
    from .holds import Holds

LONGEST_HOLD_NS = 120 * NS_PER_S
"""No hold lasts longer, whatever an action says: memory.high below a working set stalls for good without swap."""
NO_TIER = "none"


@dataclass(frozen=True, slots=True)
class Means:
    """What a rung acts with. Whatever it has to write down raises JournalError; then nothing may be done."""

    holds: Holds
    targets: Targets
    driver: CgroupDriver | None
    budgets: Budgets | None
    budget_tier: str
    now_ns: Callable[[], int]
    proc_root: Path

    def of(self, target: Target, *causes: HoldCause) -> tuple[Hold, ...]:
        """What holds a tool call back, under any of its ids; of all causes where none is given."""
        return tuple(h for i in self.targets.ids(target) for h in self.holds.of(i, *causes))

    def cap(self, expires_ns: int) -> int:
        return min(expires_ns, self.now_ns() + LONGEST_HOLD_NS)

    def hold_cgroup(
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
        expires_ns = self.cap(expires_ns)
        standing = next((h for h in self.of(target, cause) if h.kind == kind and h.path == path), None)
        if standing is not None:
            return self.holds.extend(replace(standing, decision=decision), expires_ns)
        hold = Hold(kind, cause, self.now_ns(), expires_ns, target.tool_call, decision, path, restore=restore)
        return self.holds.take(hold)[0]

    def settle(self, hold: Hold, result: Applied) -> Applied:
        """A deed that did not come to pass holds nothing back."""
        if not result.done:
            self.holds.undo([hold])
        return result


A = TypeVar("A", bound=ToolCallAction)
Undo = Callable[[Hold, CgroupDriver | None, Path], Applied]
"""Take one hold back, from its record alone and with the root of /proc. Idempotent; GONE where its target is. Never
raises OSError. The driver is there where the hold is on a cgroup."""


@dataclass(frozen=True, slots=True)
class Deed(Generic[A]):
    """How one action is carried out. `do` may raise JournalError, before anything is done."""

    action: type[A]
    do: Callable[[Means, Target, DecisionId, A], Applied]


@dataclass(frozen=True, slots=True)
class Rung:
    """One way of acting on a tool call: what it does, and how each kind of hold that it writes is undone.

    Invariant over all rungs (a test holds it): each action is one rung's, and so is each kind.
    """

    deeds: tuple[Deed[Any], ...]
    undoes: Mapping[HoldKind, Undo] = field(default_factory=dict)
    """By the kinds as this rung declares them; empty: what it does is final."""
    limits: Mapping[HoldKind, Limit] = field(default_factory=dict)
    """Those of its kinds that are a limit of a cgroup: restored from the record, it is no leftover to be lifted."""
