"""Copies KV between the device and the tiers below it.

Owns: the tiers' stores. Must not: decide who moves (placement.py), keep the books (ledger.py), or know any one tier
(table.py). Every call runs on the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..compute.kv_image import KvChunk, from_token
from ..compute.runner import Runner
from ..errors import SwapError
from ..schedule.plan import MoveDown, MoveIn, MoveOut
from ..schedule.sequence import SessionId, Slot, Tier
from .store import Store
from .table import OpenTier


@dataclass(frozen=True, slots=True)
class Copied:
    """What one move cost."""

    moved_bytes: int
    duration_ns: int


class Swapper:
    def __init__(self, runner: Runner, tiers: Iterable[OpenTier] = ()) -> None:
        self._runner = runner
        self.stores: dict[Tier, Store] = {each.tier: each.store for each in tiers}

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
        self._store(move.tier).append(move.session_id, [chunk], move.valid_tokens)
        return Copied(chunk.nbytes, time.monotonic_ns() - began)

    def back(self, move: MoveIn) -> Copied:
        """Fill the slot with the first tokens of the copy, which stays valid. Raises SwapError, the slot then empty."""
        began = time.monotonic_ns()
        chunks = self.pieces(move.session_id, move.tier, move.tokens)
        self._runner.put(move.slot, chunks)
        return Copied(sum(chunk.nbytes for chunk in chunks), time.monotonic_ns() - began)

    def down(self, move: MoveDown) -> Copied:
        """Hand the copy in one tier to another one's store. Raises SwapError where it is shorter than the books say.

        The step waits for the upper store's `read`: out of host RAM that is nothing, out of a folder a file's reading.
        """
        began = time.monotonic_ns()
        chunks = self.pieces(move.session_id, move.tier, move.tokens)
        self._store(move.tier).discard(move.session_id)
        if move.valid_tokens < move.tokens:
            chunks = from_token(chunks, move.valid_tokens)
            self._store(move.to_tier).append(move.session_id, chunks, move.valid_tokens)
        else:
            chunks = []
        return Copied(sum(chunk.nbytes for chunk in chunks), time.monotonic_ns() - began)

    def copy(self, session_id: SessionId, slot: Slot, tier: Tier, tokens: int, valid_tokens: int) -> None:
        """Make the tier's copy as long as the slot's KV, which stays. Raises SwapError, the copy then untouched."""
        chunk = self._runner.copy(slot, valid_tokens)
        if chunk.first_token != valid_tokens or chunk.end_token != tokens:
            raise SwapError(f"{session_id}: the device held {chunk.end_token} tokens, the books say {tokens}")
        self._store(tier).append(session_id, [chunk], valid_tokens)

    def keep(self, session_id: SessionId, tier: Tier, chunks: list[KvChunk]) -> None:
        """Let `chunks`, which begin at token 0, be the tier's copy."""
        self._store(tier).append(session_id, chunks, 0)

    def pieces(self, session_id: SessionId, tier: Tier, tokens: int) -> list[KvChunk]:
        """The first `tokens` of the tier's copy, which stays. Raises SwapError where it is shorter or broken."""
        return self._store(tier).read(session_id, tokens)

    def discard(self, session_id: SessionId, tier: Tier) -> None:
        """Forget a copy. Safe where there is none."""
        if (store := self.stores.get(tier)) is not None:
            store.discard(session_id)

    def discard_all(self, session_id: SessionId) -> None:
        """Forget the copies in all tiers. Safe where there are none."""
        for store in self.stores.values():
            store.discard(session_id)

    def read_ahead(self, session_id: SessionId, tier: Tier) -> None:
        """The session's copy in `tier` will soon be wanted. Safe for any tier, the device included."""
        if (store := self.stores.get(tier)) is not None:
            store.read_ahead(session_id)

    def take_failures(self) -> list[tuple[Tier, SessionId, str]]:
        """Copies that turned out unwritten since the last call, and why."""
        found = ((tier, store.take_failures()) for tier, store in self.stores.items())
        return [(tier, session_id, why) for tier, failed in found for session_id, why in failed.items()]

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def _store(self, tier: Tier) -> Store:
        if (store := self.stores.get(tier)) is None:
            raise SwapError(f"there is no {tier.value} tier")
        return store
