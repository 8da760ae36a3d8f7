"""What is being held back by this daemon.

Owns the list of what is held now, and the seam to where it is written down. A hold is written down before anything is
done, so that whoever comes after a `kill -9` of the daemon (the guardian, the next start, `equipoise release`) can
undo it without knowing why it was. Must not: know how a kind of hold is undone (rungs.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ...policies.model import ToolCallId
from .. import log
from ..errors import JournalError
from ..observe.journal import Hold, HoldCause
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect
from ..sandboxes.processes import PROC
from . import rungs


class HoldBook(Protocol):
    """Where holds are written down. The journal is one."""

    def take(self, holds: Sequence[Hold]) -> tuple[Hold, ...]:
        """Durable before it returns; answers them with their ids. Raises JournalError."""
        ...

    def extend(self, hold: Hold, expires_ns: int) -> Hold:
        """Raises JournalError."""
        ...

    def clear(self, holds: Iterable[Hold]) -> None:
        """Raises JournalError."""
        ...


class Holds:
    """Everything held back by this daemon now: the book's entries, mirrored.

    Invariant: what is held back is in the book. `take` comes before the deed, and an entry goes only after its undo.
    """

    def __init__(self, book: HoldBook, driver: CgroupDriver | None, proc_root: Path = PROC) -> None:
        self._book = book
        self._driver = driver
        self._proc_root = proc_root
        self._held: dict[int, Hold] = {}

    def take(self, *holds: Hold) -> tuple[Hold, ...]:
        """Write them down. Raises JournalError: then nothing may be done."""
        taken = self._book.take(holds)
        for hold in taken:
            self._held[_id(hold)] = hold
        return taken

    def extend(self, hold: Hold, expires_ns: int) -> Hold:
        """Raises JournalError; then the earlier expiry stands."""
        extended = self._book.extend(hold, expires_ns)
        self._held[_id(hold)] = extended
        return extended

    def all(self) -> tuple[Hold, ...]:
        return tuple(self._held.values())

    def of(self, tool_call: ToolCallId, *causes: HoldCause) -> tuple[Hold, ...]:
        """Of one tool call; of all causes where none is given."""
        return tuple(h for h in self._held.values() if h.tool_call == tool_call and (not causes or h.cause in causes))

    def due(self, now_ns: int) -> tuple[Hold, ...]:
        return tuple(h for h in self._held.values() if h.expires_ns is not None and h.expires_ns <= now_ns)

    def undo(self, holds: Iterable[Hold]) -> tuple[tuple[Hold, Applied], ...]:
        """Take them back and strike them out. What another hold still needs is left as it is; a failure stays held."""
        undone = []
        for hold in holds:
            others = [h for h in self._held.values() if h.id != hold.id and h.same_target(hold)]
            result = Applied(Effect.DONE, "", "held on") if others else rungs.undo(hold, self._driver, self._proc_root)
            if result.effect is not Effect.FAILED:
                self._held.pop(_id(hold), None)
            undone.append((hold, result))
        self._strike(hold for hold, _ in undone if _id(hold) not in self._held)
        return tuple(undone)

    def forget(self, holds: Iterable[Hold]) -> None:
        """Strike them out without undoing: their processes were killed, or someone else continued them."""
        holds = tuple(holds)
        for hold in holds:
            self._held.pop(_id(hold), None)
        self._strike(holds)

    def _strike(self, holds: Iterable[Hold]) -> None:
        try:
            self._book.clear(holds)
        except JournalError as error:
            # An entry too many is safe: undoing it once more does nothing.
            log.warning("hold_not_cleared", error=error)


def _id(hold: Hold) -> int:
    assert hold.id is not None, "the book numbers a hold when it is taken"
    return hold.id
