"""What keeps the copies of one tier: the seam that a new tier implements; and the tier in host RAM, which is a dict.

Owns: the protocol, and the host's copies, in pieces as they were appended. Must not: decide, or keep the ledger.
"""

from __future__ import annotations

from typing import Protocol

from ..compute.kv_image import KvChunk, cut_to
from ..errors import SwapError
from ..schedule.sequence import SessionId


class Store(Protocol):
    """Copies of sessions' KV, each a prefix of its conversation, in pieces. Called on the engine's thread only."""

    def append(self, session_id: SessionId, chunks: list[KvChunk], valid_tokens: int) -> None:
        """After the first `valid_tokens` of what is kept come `chunks`; the rest is forgotten. Must not block."""

    def read(self, session_id: SessionId, tokens: int) -> list[KvChunk]:
        """The first `tokens`, which stay. May block. Raises SwapError where the copy is shorter or broken."""

    def read_ahead(self, session_id: SessionId) -> None:
        """A `read` will come soon. Safe for a session without a copy."""

    def discard(self, session_id: SessionId) -> None:
        """Forget the copy. Safe where there is none."""

    def take_failures(self) -> dict[SessionId, str]:
        """Copies that were lost after `append` had returned, since the last call, and why."""

    def close(self) -> None:
        """Forget everything; nothing is called afterwards."""


class HostTier:
    """Copies in host RAM."""

    def __init__(self) -> None:
        self._chunks: dict[SessionId, list[KvChunk]] = {}

    def append(self, session_id: SessionId, chunks: list[KvChunk], valid_tokens: int) -> None:
        self._chunks[session_id] = [*cut_to(self._chunks.get(session_id, []), valid_tokens), *chunks]

    def read(self, session_id: SessionId, tokens: int) -> list[KvChunk]:
        chunks = cut_to(self._chunks.get(session_id, []), tokens)
        if not chunks or chunks[-1].end_token != tokens:
            raise SwapError(f"{session_id}: the host copy is shorter than {tokens} tokens")
        return chunks

    def read_ahead(self, session_id: SessionId) -> None:
        pass  # nothing is nearer

    def discard(self, session_id: SessionId) -> None:
        self._chunks.pop(session_id, None)

    def take_failures(self) -> dict[SessionId, str]:
        return {}

    def close(self) -> None:
        self._chunks.clear()

    def tokens(self, session_id: SessionId) -> int:
        """Tokens really kept: for tests of the books."""
        chunks = self._chunks.get(session_id)
        return chunks[-1].end_token if chunks else 0
