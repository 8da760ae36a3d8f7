"""Copies KV between the device and the other tiers, and keeps the copies.

Owns: the host copies (in pieces, as they were appended) and the disk tier. Must not: decide who moves (placement.py) or
keep the books (ledger.py). Every call runs on the engine's thread; only the disk tier has one of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..compute.kv_image import KvChunk, cut_to, from_token
from ..compute.runner import Runner
from ..errors import SwapError
from ..schedule.plan import MoveDown, MoveIn, MoveOut
from ..schedule.sequence import SessionId, Slot, Tier
from .disk_tier import DiskTier


@dataclass(frozen=True, slots=True)
class Copied:
    """What one move cost."""

    moved_bytes: int
    duration_ns: int


class Swapper:
    def __init__(self, runner: Runner, disk: DiskTier | None = None) -> None:
        self._runner = runner
        self._disk = disk
        self._host: dict[SessionId, list[KvChunk]] = {}

    def out(self, move: MoveOut) -> Copied:
        """Empty the slot into the tier, copying only what the tier does not hold yet. Raises SwapError."""
        began = time.monotonic_ns()
        if move.valid_tokens >= move.tokens:
            self._runner.cut(move.slot, 0)
            return Copied(0, time.monotonic_ns() - began)
        chunk = self._runner.take(move.slot, move.valid_tokens)
        if chunk.first_token != move.valid_tokens or chunk.end_token != move.tokens:
            raise SwapError(
                f"{move.session_id}: the device held tokens {chunk.first_token} to {chunk.end_token}, "
                f"the books say {move.valid_tokens} to {move.tokens}"
            )
        if move.tier is Tier.HOST:
            kept = cut_to(self._host.get(move.session_id, []), move.valid_tokens)
            self._host[move.session_id] = [*kept, chunk]
        else:
            self._require_disk().append(move.session_id, [chunk], move.valid_tokens)
        return Copied(chunk.nbytes, time.monotonic_ns() - began)

    def back(self, move: MoveIn) -> Copied:
        """Fill the slot with the first tokens of the copy, which stays valid. Raises SwapError, the slot then empty."""
        began = time.monotonic_ns()
        chunks = self.pieces(move.session_id, move.tier, move.tokens)
        self._runner.put(move.slot, chunks)
        return Copied(sum(chunk.nbytes for chunk in chunks), time.monotonic_ns() - began)

    def down(self, move: MoveDown) -> Copied:
        """Hand the host copy to the disk's thread. Raises SwapError where it is shorter than the books say."""
        began = time.monotonic_ns()
        chunks = cut_to(self._host.pop(move.session_id, []), move.tokens)
        if not chunks or chunks[-1].end_token != move.tokens:
            raise SwapError(f"{move.session_id}: the host copy is shorter than {move.tokens} tokens")
        if move.valid_tokens < move.tokens:
            chunks = from_token(chunks, move.valid_tokens)
            self._require_disk().append(move.session_id, chunks, move.valid_tokens)
        else:
            chunks = []
        return Copied(sum(chunk.nbytes for chunk in chunks), time.monotonic_ns() - began)

    def copy(self, session_id: SessionId, slot: Slot, tokens: int, valid_tokens: int) -> None:
        """Make the host copy as long as the slot's KV, which stays. Raises SwapError, the host copy then untouched."""
        chunk = self._runner.copy(slot, valid_tokens)
        if chunk.first_token != valid_tokens or chunk.end_token != tokens:
            raise SwapError(f"{session_id}: the device held {chunk.end_token} tokens, the books say {tokens}")
        self.keep(session_id, [*cut_to(self._host.get(session_id, []), valid_tokens), chunk])

    def keep(self, session_id: SessionId, chunks: list[KvChunk]) -> None:
        """Let `chunks`, which begin at token 0, be the host copy."""
        self._host[session_id] = chunks

    def pieces(self, session_id: SessionId, tier: Tier, tokens: int) -> list[KvChunk]:
        """The first `tokens` of the host or disk copy, which stays. Raises SwapError where it is shorter or broken."""
        if tier is Tier.HOST:
            chunks = cut_to(self._host.get(session_id, []), tokens)
        else:
            chunks = self._require_disk().read(session_id, tokens)
        if not chunks or chunks[-1].end_token != tokens:
            raise SwapError(f"{session_id}: the {tier.value} copy is shorter than {tokens} tokens")
        return chunks

    def discard(self, session_id: SessionId, tier: Tier) -> None:
        """Forget a copy. Safe where there is none."""
        if tier is Tier.HOST:
            self._host.pop(session_id, None)
        elif tier is Tier.DISK and self._disk is not None:
            self._disk.discard(session_id)

    def read_ahead(self, session_id: SessionId) -> None:
        """The session will soon be wanted on the device: begin to read its file."""
        if self._disk is not None:
            self._disk.read_ahead(session_id)

    def take_failures(self) -> dict[SessionId, str]:
        """Disk copies that could not be written since the last call, and why."""
        return self._disk.take_failures() if self._disk is not None else {}

    def host_tokens(self, session_id: SessionId) -> int:
        """Tokens really kept on the host: for tests of the books."""
        chunks = self._host.get(session_id)
        return chunks[-1].end_token if chunks else 0

    def close(self) -> None:
        self._host.clear()
        if self._disk is not None:
            self._disk.close()

    def _require_disk(self) -> DiskTier:
        if self._disk is None:
            raise SwapError("no disk tier: start the engine with --disk-bytes and --disk-folder")
        return self._disk
