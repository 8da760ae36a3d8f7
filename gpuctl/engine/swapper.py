"""Copies KV between the device and the other tiers and keeps what was copied.

Owns: the stored copies. Must not: decide who moves (scheduler.py) nor keep the books (ledger.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from .errors import SwapError
from .runner import Blob, Runner
from .sequence import SessionId, Slot


@dataclass(frozen=True, slots=True)
class Copied:
    """What one move cost."""

    moved_bytes: int
    duration_ns: int


class HostStore:
    """Copies in host RAM."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._copies: dict[SessionId, Blob] = {}

    def out(self, session_id: SessionId, slot: Slot, tokens: int, valid_tokens: int) -> Copied:
        """Copy the slot to the host and empty it. Nothing is copied where the stored copy is long enough."""
        began = time.monotonic_ns()
        moved = 0
        if valid_tokens < tokens:
            blob = self._runner.save(slot)
            self._copies[session_id] = blob
            moved = blob.size
        self._runner.cut(slot, 0)
        return Copied(moved, time.monotonic_ns() - began)

    def back(self, session_id: SessionId, slot: Slot, tokens: int) -> Copied:
        """Fill the slot with the first `tokens` of the stored copy, which stays valid. Raises SwapError."""
        began = time.monotonic_ns()
        blob = self._copies.get(session_id)
        if blob is None:
            raise SwapError(f"{session_id}: no copy on the host")
        self._runner.load(slot, blob)
        self._runner.cut(slot, tokens)
        if self._runner.held_tokens(slot) != tokens:
            raise SwapError(f"{session_id}: the copy on the host is shorter than {tokens} tokens")
        return Copied(blob.size, time.monotonic_ns() - began)

    def discard(self, session_id: SessionId) -> None:
        """Forget the copy. Safe where there is none."""
        self._copies.pop(session_id, None)

    @property
    def stored_bytes(self) -> int:
        return sum(blob.size for blob in self._copies.values())
