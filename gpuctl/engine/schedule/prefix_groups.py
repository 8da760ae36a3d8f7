"""Which waiting turns begin alike, so that one computes what they share and the others then use its cells.

Owns: the groups, who of each computes now, and which turn waits for whom. Pure. Must not: order tenants, admit
(scheduler.py) or touch the books (ledger.py).

- A group is the turns of one tenant that hold nothing yet and begin with the same `least_tokens` tokens.
- While one of them computes a prefix it has in common with a waiting one, the latter is passed over; then it takes the
  cells and computes only its own rest. So N agents with one system prompt cost it once.
- Within its tenant a group stands where its oldest waiting member stands, so that its members enter next to each other
  while the prefix is there. A turn that arrived between them is overtaken by those that came later only as long as an
  older member still waits: never for good. Other tenants see nothing of it.
- A turn waits only where `least_tokens` or more are still to come, while the other one really computes, `wait_steps`
  steps at most over its life, and with a wished time to first token only for one that has such a wish, too (others give
  way to it and might stand still).

Source: Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and
Throughput-oriented Token Batching" (2024). Its offline tree of all requests is here a hash of the first tokens and, per
turn, one chained hash a block, as turns come and go: how far two turns agree is a binary search over their blocks. A
collision can only make turns of one tenant wait in vain: what is really shared is compared token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .ledger import Ledger
from .sequence import SessionId, TenantId, Token, Turn, common_prefix

_BLOCK_TOKENS = 32
# Choosing takes some 5 us. Where hundreds of turns of one group arrive at once, the rest choose in the next steps: more
# than these could hardly enter before.
_CHOICES_A_STEP = 32


@dataclass(slots=True, eq=False)
class _Member:
    turn: Turn
    tokens: Sequence[Token]
    group: _Group
    block_keys: tuple[int, ...]
    """Entry i stands for all tokens of the first i + 1 blocks."""
    leader: _Member | None = None
    """Whom it waits for, and until that one has so many tokens on the device."""
    awaited_tokens: int = 0
    held_tokens: int | None = None
    """While it computes: what it has on the device, as of the step's beginning. None: it does not compute."""


@dataclass(slots=True, eq=False)
class _Group:
    key: tuple[TenantId, tuple[Token, ...]]
    waiting: dict[SessionId, _Member] = field(default_factory=dict)
    """In order of arrival."""
    computing: dict[SessionId, _Member] = field(default_factory=dict)
    oldest_ns: int = 0
    """Arrival of the oldest that waits."""


class PrefixGroups:
    def __init__(self, ledger: Ledger, least_tokens: int | None, wait_steps: int) -> None:
        """`least_tokens`: the shortest prefix worth sharing; None: nothing is shared and nobody waits."""
        self._ledger = ledger
        self._least_tokens = least_tokens
        self._wait_steps = wait_steps
        self._block_tokens = min(_BLOCK_TOKENS, least_tokens or _BLOCK_TOKENS)
        self._groups: dict[tuple[TenantId, tuple[Token, ...]], _Group] = {}
        self._members: dict[SessionId, _Member] = {}
        self._computing: dict[SessionId, _Member] = {}
        self._choices_left = 0

    def begin_step(self) -> None:
        """Look up how far each of those that compute has got. Call before `passes_over`."""
        self._choices_left = _CHOICES_A_STEP
        for session_id, member in self._computing.items():
            member.held_tokens = self._ledger.holding(session_id).device_tokens

    def arrive(self, turn: Turn, tokens: Sequence[Token]) -> None:
        """A turn that holds nothing is queued. `tokens`: its prompt first; kept, so it may only grow.

        Takes 10 to 20 us per 1000 tokens.
        """
        if self._least_tokens is None or len(tokens) <= self._least_tokens:
            return
        key = (turn.tenant_id, tuple(tokens[: self._least_tokens]))
        group = self._groups.setdefault(key, _Group(key))
        member = _Member(turn, tokens, group, self._keys(tokens))
        if not group.waiting:
            group.oldest_ns = turn.arrival_ns
        group.waiting[turn.session_id] = self._members[turn.session_id] = member

    def enter(self, session_id: SessionId) -> None:
        """The turn begins to be computed. Safe for one without a group."""
        if (member := self._members.get(session_id)) is not None:
            member.leader = None
            member.held_tokens = self._ledger.holding(session_id).device_tokens
            self._stop_waiting(member)
            member.group.computing[session_id] = self._computing[session_id] = member

    def leave(self, session_id: SessionId) -> None:
        """The turn ended, left the batch, or has its whole prompt computed. Safe for one without a group."""
        if (member := self._members.pop(session_id, None)) is None:
            return
        group = member.group
        member.held_tokens = None
        self._stop_waiting(member)
        group.computing.pop(session_id, None)
        self._computing.pop(session_id, None)
        if not group.waiting and not group.computing:
            del self._groups[group.key]

    def _stop_waiting(self, member: _Member) -> None:
        waiting = member.group.waiting
        if waiting.pop(member.turn.session_id, None) is not None and waiting:
            member.group.oldest_ns = next(iter(waiting.values())).turn.arrival_ns

    def standing_ns(self, turn: Turn) -> int:
        """The arrival that counts for the turn's place within its tenant: that of its group's oldest waiting turn."""
        member = self._members.get(turn.session_id)
        if member is None or member.held_tokens is not None:
            return turn.arrival_ns
        return min(member.group.oldest_ns, turn.arrival_ns)

    def passes_over(self, turn: Turn) -> bool:
        """Whether the turn is not to enter in this step since another computes what it will share. Counts the wait."""
        member = self._members.get(turn.session_id)
        if member is None or not member.group.computing or turn.group_waits >= self._wait_steps:
            return False
        leader = member.leader
        if leader is None or leader.held_tokens is None or leader.held_tokens >= member.awaited_tokens:
            if self._choices_left <= 0 and turn.due_ns is None:
                turn.group_waits += 1
                return True
            self._choices_left -= 1
            self._choose_leader(member)
            if member.leader is None:
                return False
        turn.group_waits += 1
        return True

    def _choose_leader(self, member: _Member) -> None:
        """The one that computes the longest prefix in common with `member`, if so much of it is to come yet that the
        wait is worth it: as much as is worth sharing."""
        assert self._least_tokens is not None
        member.leader, member.awaited_tokens = None, 0
        for leader in member.group.computing.values():
            if member.turn.due_ns is not None and leader.turn.due_ns is None:
                continue
            common = self._common_tokens(leader, member)
            assert leader.held_tokens is not None
            if common > member.awaited_tokens and common - leader.held_tokens >= self._least_tokens:
                member.leader, member.awaited_tokens = leader, common

    def _common_tokens(self, leader: _Member, member: _Member) -> int:
        """How long a prefix of its prompt the member could share with the leader."""
        ours, theirs = member.block_keys, leader.block_keys
        low, high = 0, min(len(ours), len(theirs))
        while low < high:
            middle = (low + high + 1) // 2
            if ours[middle - 1] == theirs[middle - 1]:
                low = middle
            else:
                high = middle - 1
        parting = slice(low * self._block_tokens, (low + 1) * self._block_tokens)
        common = parting.start + common_prefix(member.tokens[parting], leader.tokens[parting])
        return min(common, leader.turn.prompt_tokens, member.turn.prompt_tokens - 1)

    def _keys(self, tokens: Sequence[Token]) -> tuple[int, ...]:
        keys, key, size = [], 0, self._block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            key = hash((key, *tokens[start : start + size]))
            keys.append(key)
        return tuple(keys)

    def check_integrity(self) -> None:
        """Raise AssertionError where a member is lost or kept twice, or a group is empty."""
        held = [s for g in self._groups.values() for s in (*g.waiting, *g.computing)]
        assert len(held) == len(set(held)), f"in two places: {sorted(held)}"
        assert set(held) == set(self._members), f"groups hold {sorted(held)}, members are {sorted(self._members)}"
        for key, group in self._groups.items():
            assert group.waiting or group.computing, f"an empty group of {key[0]}"
            for member in (*group.waiting.values(), *group.computing.values()):
                assert member.group is group and member.turn.tenant_id == key[0], member.turn.session_id
                assert (member.held_tokens is not None) == (member.turn.session_id in self._computing)
            if group.waiting:
                assert group.oldest_ns == next(iter(group.waiting.values())).turn.arrival_ns
