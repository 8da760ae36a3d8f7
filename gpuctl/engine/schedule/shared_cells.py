"""Which sessions use the same device cells: a tree of shared prefixes, as llama.cpp's cells really are.

Owns: the tree, and what sharing spares. Must not: know slots, tiers or tokens' values (ledger.py, placement.py).
A cell of llama.cpp carries the set of sequences that use it and is free when the last one has left. So sessions that
began alike form a tree: a node is the stretch of cells up to `end_tokens` that its `count` sessions have in common, its
parent a shorter prefix that more of them share. Prefixes nest to any depth.

Invariants (`check_integrity`)
- every node is used by at least two sessions, and reaches further than its parent;
- a session is booked at the deepest node it uses; a node's count is that of the sessions booked at it or below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .sequence import SessionId


@dataclass(slots=True, eq=False)
class SharedPrefix:
    """The first `end_tokens` of `count` conversations lie in the same cells."""

    end_tokens: int
    parent: SharedPrefix | None
    count: int

    @property
    def start_tokens(self) -> int:
        """Where this node's own stretch begins."""
        return self.parent.end_tokens if self.parent is not None else 0

    @property
    def stretch_tokens(self) -> int:
        return self.end_tokens - self.start_tokens

    def path(self) -> Iterator[SharedPrefix]:
        """This node and those above it, deepest first."""
        node: SharedPrefix | None = self
        while node is not None:
            yield node
            node = node.parent


class SharedCells:
    def __init__(self) -> None:
        self.saved_tokens = 0
        """Device tokens spared: what the sessions would use without sharing, less what they use."""
        self._deepest: dict[SessionId, SharedPrefix] = {}

    def shared_tokens(self, session_id: SessionId) -> int:
        """Length of the prefix the session shares with at least one other."""
        node = self._deepest.get(session_id)
        return node.end_tokens if node is not None else 0

    def charged_tokens(self, session_id: SessionId) -> float:
        """The session's part of the cells it shares: a stretch with n users counts 1/n for each of them."""
        node = self._deepest.get(session_id)
        return sum(n.stretch_tokens / n.count for n in node.path()) if node is not None else 0.0

    def share(self, donor_id: SessionId, session_id: SessionId, tokens: int) -> None:
        """The session, which shares nothing yet, uses the donor's first `tokens` cells; more than 0."""
        assert session_id not in self._deepest, f"{session_id}: shares a prefix already"
        node = self._node_at(donor_id, tokens)
        self._deepest[session_id] = node
        for above in node.path():
            above.count += 1
        self.saved_tokens += tokens

    def cut(self, session_id: SessionId, to_tokens: int) -> None:
        """The session keeps its first `to_tokens` at most; of those it shares what it shared. 0: nothing any more."""
        deepest = self._deepest.get(session_id)
        if deepest is None or to_tokens >= deepest.end_tokens:
            return
        kept = self._node_at(session_id, to_tokens) if to_tokens > 0 else None
        left = self._deepest.pop(session_id)
        for node in left.path():
            if node is kept:
                break
            node.count -= 1
            self.saved_tokens -= node.stretch_tokens
        if kept is not None:
            self._deepest[session_id] = kept
        self._tidy()

    def freed_with(self, leaving: Iterable[SessionId]) -> int:
        """Shared device tokens that are free once all of `leaving` have left; those others use stay."""
        users: dict[SharedPrefix, int] = {}
        for session_id in leaving:
            if (deepest := self._deepest.get(session_id)) is not None:
                for node in deepest.path():
                    users[node] = users.get(node, 0) + 1
        return sum(node.stretch_tokens for node, count in users.items() if count == node.count)

    def _node_at(self, session_id: SessionId, tokens: int) -> SharedPrefix:
        """The node of the session's path that ends at `tokens`, made where there is none. Counts stay right, though a
        new leaf has one user until the caller adds another."""
        below: SharedPrefix | None = None
        above = self._deepest.get(session_id)
        while above is not None and above.end_tokens > tokens:
            below, above = above, above.parent
        if above is not None and above.end_tokens == tokens:
            return above
        node = SharedPrefix(tokens, above, below.count if below is not None else 1)
        if below is not None:
            below.parent = node
        else:
            self._deepest[session_id] = node
        return node

    def _tidy(self) -> None:
        """A stretch with one user left is no longer shared; two stretches with the same users become one."""
        for session_id, deepest in list(self._deepest.items()):
            node: SharedPrefix | None = deepest
            while node is not None and node.count == 1:
                node = node.parent
            if node is None:
                del self._deepest[session_id]
                continue
            self._deepest[session_id] = node
            for below in node.path():
                # Nobody is booked at a parent whose users all reach further.
                while below.parent is not None and below.parent.count == below.count:
                    below.parent = below.parent.parent

    def check_integrity(self, device_tokens: Mapping[SessionId, int]) -> None:
        """Raise AssertionError where an invariant does not hold; `device_tokens`: what each session holds."""
        counts: dict[SharedPrefix, int] = {}
        for session_id, deepest in self._deepest.items():
            held = device_tokens.get(session_id, 0)
            assert held >= deepest.end_tokens, f"{session_id}: holds {held}, shares {deepest.end_tokens}"
            for node in deepest.path():
                counts[node] = counts.get(node, 0) + 1
                assert node.stretch_tokens > 0, f"{session_id}: a shared prefix of {node.stretch_tokens} more tokens"
        for node, count in counts.items():
            assert node.count == count, f"prefix of {node.end_tokens}: books say {node.count} users, {count} are"
            assert count > 1, f"prefix of {node.end_tokens}: shared with nobody"
        saved = sum(node.stretch_tokens * (count - 1) for node, count in counts.items())
        assert saved == self.saved_tokens, f"books say sharing spares {self.saved_tokens}, the tree spares {saved}"
