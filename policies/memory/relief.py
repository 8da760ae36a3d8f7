"""What is held back under lasting pressure: one call at a time by each rule of the ladder, and let go when it is over.

Owns which call. Must not: answer who stands at its budget (ladder.py does).
"""

from __future__ import annotations

from ..actions import Action, Candidate, Freeze, Thaw, Throttle
from ..fairness import Share
from ..model import TenantId, ToolCall, ToolCallPhase
from ..policy import LadderRule, Policy, Rung
from ..snapshot import Snapshot
from .step import Step, mib, pays_first

THROTTLE_AT_LEAST_RATIO = 0.01
"""Of the pool: slowing down a call that holds less than this relieves nobody."""
_HELD = {Rung.THROTTLE: ToolCallPhase.THROTTLED, Rung.FREEZE: ToolCallPhase.FROZEN}


def relieve(snapshot: Snapshot, policy: Policy, by_tenant: dict[TenantId, Share], pool: int) -> list[Step]:
    """Hold back one call of whoever is furthest above its share by each rule that presses; let go when it is over."""
    steps = [step for rung in Rung for step in _let_go(rung, snapshot, policy, pool)]
    for rule, since_ns in snapshot.pressed:
        about = {step.call.id for step in steps}
        candidates = [
            c for c in _can_be_held_back(snapshot, pool) if c.id not in about and has_run_for_it(rule, c, snapshot)
        ]
        candidates.sort(key=lambda c: pays_first(c, by_tenant))
        if candidates and _is_due(rule, since_ns, snapshot):
            steps.append(_hold_back(rule, candidates, by_tenant, snapshot, pool))
    return steps


def _let_go(rung: Rung, snapshot: Snapshot, policy: Policy, pool: int) -> list[Step]:
    """Calls that no pressing rule of this rung holds back any more."""
    if any(rule.rung is rung for rule, _ in snapshot.pressed):
        return []
    rule = next((rule for rule in policy.memory.ladder if rule.rung is rung), None)
    measured = rule.measure.of(snapshot.tool_used_bytes(), pool, snapshot.host) if rule else None
    return [
        Step(
            call,
            Thaw(call.id),
            f"{rule.measure.value} below {rule.below_ratio:.2f}" if rule else f"no rule says {rung.value} any more",
            measured or 0.0,
            rule.below_ratio if rule else 0.0,
            rule.measure.unit if rule else "rules of that kind",
            _pool_words(snapshot, pool),
        )
        for call in snapshot.tool_calls
        if call.phase is _HELD[rung] and call.gone_ns is None
    ]


def _is_due(rule: LadderRule, since_ns: int, snapshot: Snapshot) -> bool:
    """Whether it has pressed for long enough, and so long since it last held a call back."""
    held = [c for c in snapshot.tool_calls if c.phase is _HELD[rule.rung] and c.gone_ns is None]
    pressed_ns = snapshot.now_ns - since_ns
    since_last_ns = min((snapshot.now_ns - c.phase_since_ns for c in held), default=pressed_ns)
    return min(pressed_ns, since_last_ns) >= rule.for_ns


def _can_be_held_back(snapshot: Snapshot, pool: int) -> list[ToolCall]:
    return [
        c
        for c in snapshot.tool_calls
        if c.phase is ToolCallPhase.RUNNING
        and c.gone_ns is None
        and not c.exempt
        and c.used_bytes >= THROTTLE_AT_LEAST_RATIO * pool
    ]


def has_run_for_it(rule: LadderRule, call: ToolCall, snapshot: Snapshot) -> bool:
    """What is frozen gets nowhere: it must have run as long before, or it would never end while the pressure lasts."""
    return rule.rung is not Rung.FREEZE or snapshot.now_ns - call.phase_since_ns >= rule.lasting_ns


def _hold_back(
    rule: LadderRule, candidates: list[ToolCall], by_tenant: dict[TenantId, Share], snapshot: Snapshot, pool: int
) -> Step:
    call = candidates[0]
    share = by_tenant[call.tenant]
    expires_ns = snapshot.now_ns + rule.lasting_ns
    action: Action = Freeze(call.id, expires_ns)
    if rule.rung is Rung.THROTTLE:
        action = Throttle(call.id, call.used_bytes, rule.cpu_ratio, expires_ns)
    return Step(
        call,
        action,
        rule.words,
        rule.measure.of(snapshot.tool_used_bytes(), pool, snapshot.host) or 0.0,
        rule.above_ratio,
        rule.measure.unit,
        f"{_pool_words(snapshot, pool)}; {call.tenant} is furthest above its share "
        f"({share.weighted:.2f} weighted {share.resource})",
        tuple(
            Candidate(f"{rule.rung.value} {c.kind} of {c.tenant}", -by_tenant[c.tenant].weighted) for c in candidates
        ),
    )


def _pool_words(snapshot: Snapshot, pool: int) -> str:
    return f"the pool holds {mib(snapshot.tool_used_bytes())} of {mib(pool)}"
