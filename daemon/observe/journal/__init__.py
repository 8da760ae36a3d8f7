"""The journal: SQLite in WAL mode, one writer (the daemon), any number of readers."""

from __future__ import annotations

from .reader import JournalReader
from .records import Loss, Run, Sample, Series, Turn
from .writer import Journal, lock_holder

__all__ = ["Journal", "JournalReader", "Loss", "Run", "Sample", "Series", "Turn", "lock_holder"]
