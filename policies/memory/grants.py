"""Who is granted memory next, so that no two calls stand half-grown in a pool that either alone would fit.

The banker's algorithm (Dijkstra, EWD 623), with predictions in place of claims where a kind is well known: a budget is
raised only where an order is left in which every call reaches the peak to be ready for, each giving back what it holds
as it ends. Else it waits at the budget it has. One call, the leader, is served whatever is predicted: so one always
goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..model import MIB, NS_PER_S, TenantId, ToolCall, ToolCallId, ToolCallPhase
from ..policy import Budget, Policy
from ..snapshot import Snapshot

PROMISE_NS = NS_PER_S
"""How long a grant counts as used. Longer would keep memory free that a call may never ask for."""
CLAIM_QUANTILE = 0.99
"""Of the peaks of its kind that lie beyond what a call uses: that much it is predicted to reach."""
WELL_KNOWN_COUNT = 20
"""Ended calls of a kind before its peaks are believed: the next one passes the largest of n in one case of n + 1."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one call has of the pool, promises included, and what it is predicted to need beyond that, in bytes."""

    held: int
    need: int


def promised_bytes(call: ToolCall, now_ns: int) -> int:
    """What a call was granted so lately that it can not have used it all yet: it must not be granted twice.

    A call that is ended now gives its promise back with its memory.
    """
    if call.granted_ns is None or now_ns - call.granted_ns >= PROMISE_NS:
        return 0
    return max(0, call.hard_bytes - call.used_bytes) if holds_memory(call) and call.stopped_ns is None else 0


def holds_memory(call: ToolCall) -> bool:
    return call.gone_ns is None and call.phase is not ToolCallPhase.KILLED


def claim_bytes(call: ToolCall, snapshot: Snapshot, policy: Policy, pool: int) -> int:
    """The peak to be ready for: what was announced, else by its kind; of a kind that is not well known, the most that
    a call can be granted, as in Dijkstra's rule."""
    held = call.used_bytes + promised_bytes(call, snapshot.now_ns)
    most = min(policy.memory.max_bytes, pool)
    if call.expected_bytes is not None and call.expected_bytes > held:
        predicted = call.expected_bytes
    elif snapshot.estimates.ended_count(call.kind) < WELL_KNOWN_COUNT:
        predicted = most
    else:
        predicted = snapshot.estimates.peak_beyond_bytes(call.kind, held, CLAIM_QUANTILE)
    return max(held, min(predicted, most))


def service_order(call: ToolCall, rank: Mapping[TenantId, int]) -> tuple[int, int, int, int]:
    """A sort key. Who was granted something goes on being served, the oldest first: a turn that changed hands midway
    would leave all half-grown. Then by tenant (`rank` 0 first), and who has waited longest."""
    if call.granted_ns is not None:
        return (0, call.start_ns, 0, call.id)
    return (1, rank[call.tenant], call.stopped_ns or 0, call.id)


def leader(calls: Iterable[ToolCall], rank: Mapping[TenantId, int]) -> ToolCall | None:
    """Of the calls that ask or were granted something, the one that is served before all others."""
    asking = [c for c in calls if c.stopped_ns is not None or (c.granted_ns is not None and c.running)]
    asking = [c for c in asking if holds_memory(c)]
    return min(asking, key=lambda call: service_order(call, rank), default=None)


class Books:
    """Who holds and needs what, brought up to date with every grant; for one moment."""

    def __init__(self, calls: Iterable[ToolCall], snapshot: Snapshot, policy: Policy, pool: int) -> None:
        self._holdings: dict[ToolCallId, Holding] = {}
        for call in calls:
            held = call.used_bytes + promised_bytes(call, snapshot.now_ns)
            self._holdings[call.id] = Holding(held, claim_bytes(call, snapshot, policy, pool) - held)

    def is_safe(self, call: ToolCall, hard_bytes: int, left_bytes: int) -> bool:
        """Whether all can reach their predicted peaks in some order once the call's budget is `hard_bytes` and
        `left_bytes` of the pool are free."""
        after = self._after(call, hard_bytes)
        if sum(each.need for each in after.values()) <= left_bytes:
            return True
        # Who needs least goes first: where that order fails, every order does.
        for each in sorted(after.values(), key=lambda holding: holding.need):
            if each.need > left_bytes:
                return False
            left_bytes += each.held
        return True

    def granted(self, call: ToolCall, hard_bytes: int) -> None:
        self._holdings = self._after(call, hard_bytes)

    def _after(self, call: ToolCall, hard_bytes: int) -> dict[ToolCallId, Holding]:
        known = self._holdings[call.id]
        claim = max(hard_bytes, known.held + known.need)
        return {**self._holdings, call.id: Holding(hard_bytes, claim - hard_bytes)}


def first_budget(call: ToolCall, policy: Policy, pool: int, sharers: int) -> Budget:
    """What a call begins with by class, kind and tenant: at least what was announced, where that many fit the pool."""
    usual = policy.budget_for(call)
    budget = entry_budget(usual, pool, sharers)
    # In a pool too small for all it has to ask like the others: what was announced is then known for its claim.
    announced = min(call.expected_bytes or 0, policy.memory.max_bytes) if budget == usual else 0
    return Budget(budget.soft_bytes, max(budget.hard_bytes, announced))


UNASKED_RATIO = 0.25
"""Of the pool: what all calls together may take before they ask. The rest is for those that ask, one after another."""
UNASKED_LEAST_BYTES = 16 * MIB
"""Less would stop what any interpreter needs to start."""


def entry_budget(budget: Budget, pool: int, sharers: int) -> Budget:
    """What a call begins with: the policy's budget, or less where so many share a pool so small, in bytes.

    `sharers`: calls that may begin with it at a time. `pool` 0: not known, and nobody has less.
    A budget above a third of the pool stays: whoever wrote that wants few calls and no asking.
    """
    fair_bytes = max(UNASKED_LEAST_BYTES, int(UNASKED_RATIO * pool) // max(1, sharers))
    if not pool or budget.hard_bytes <= fair_bytes or budget.hard_bytes > pool // 3:
        return budget
    return Budget(max(1, budget.soft_bytes * fair_bytes // budget.hard_bytes), fair_bytes)
