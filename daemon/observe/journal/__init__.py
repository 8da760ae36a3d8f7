"""The journal: SQLite in WAL mode, one writer (the daemon), any number of readers.

Owns: the file, its tables and the facts as they lie there. Must not: undo a hold (enforce/ does).

Seen from outside: `Hold`, `HoldCause`, `HoldKind`, `Needs`, `Journal`, `JournalReader`, `Run`, `Sample`,
`Series`, `clear_holds`, `lock_holder`.
"""

from __future__ import annotations

from .hold import Hold, HoldCause, HoldKind, Needs
from .reader import JournalReader
from .records import Loss, Run, Sample, Series, Turn
from .writer import Journal, clear_holds, lock_holder

__all__ = [
    "Hold",
    "HoldCause",
    "HoldKind",
    "Journal",
    "JournalReader",
    "Loss",
    "Needs",
    "Run",
    "Sample",
    "Series",
    "Turn",
    "clear_holds",
    "lock_holder",
]
