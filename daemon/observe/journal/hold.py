"""What the journal records of something that is held back.

Owns the fact `Hold`. It says enough to be undone from the record alone, by whoever comes after a `kill -9` of the
daemon. Kinds and causes are text in the journal, and open sets: each rung of enforce/ declares its own, so that this
module knows of a new one only when it meets one. Must not: undo anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....policies.model import DecisionId, ToolCallId
from ...sandboxes.processes import ProcessRef


class Word(str):
    """A member of an open set: text as it stands in the journal, equal by its text."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The bare text, as an Enum's."""
        return str(self)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a hold of one kind must say so that it can be undone."""

    process: bool = False
    """It names a process; else a cgroup."""
    restore: bool = False
    """It knows the old text of a limit."""
    expiry: bool = True


class HoldKind(Word):
    """How something is held back, and so how that is undone. Whoever declares one says what it `needs`.

    Read back from a journal, a kind is the word alone: what it needs was checked when it was written.
    """

    ARMED: ClassVar[HoldKind]
    """The kernel may stop processes of this cgroup at a budget. Holds nothing back by itself, so it never expires;
    undoing it continues whatever is stopped there."""

    needs: Needs | None

    def __new__(cls, text: str, needs: Needs | None = None) -> HoldKind:
        kind = super().__new__(cls, text)
        kind.needs = needs
        return kind


HoldKind.ARMED = HoldKind("armed", Needs(expiry=False))


class HoldCause(Word):
    """Why it is held back."""

    BUDGET: ClassVar[HoldCause]
    """Stopped at its hard budget: until a grant, a kill, or the end of its wait."""


HoldCause.BUDGET = HoldCause("budget")


@dataclass(frozen=True, slots=True)
class Hold:
    """One thing that is held back.

    Invariants: it names a process or a cgroup, never both, and says what its kind needs, no more and no less.
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
        self.check(self.kind.needs)

    def check(self, needs: Needs | None) -> None:
        """Raises ValueError where it could not be undone; with None, only where it names no one target."""
        of = f"a hold of kind {self.kind}"
        if (self.path is None) != (self.process is not None):
            raise ValueError(f"{of} on path={self.path} process={self.process}")
        if needs is None:
            return
        if (self.expires_ns is not None) != needs.expiry:
            raise ValueError(f"{of} with expires_ns={self.expires_ns}")
        if (self.process is not None) != needs.process:
            raise ValueError(f"{of} on path={self.path} process={self.process}")
        if (self.restore is not None) != needs.restore:
            raise ValueError(f"{of} with restore={self.restore}")

    @property
    def target(self) -> str:
        return self.path if self.path is not None else f"pid {self.process.pid if self.process else '?'}"

    def same_target(self, other: Hold) -> bool:
        """Whether undoing one would undo the other."""
        return self.kind == other.kind and self.path == other.path and self.process == other.process
