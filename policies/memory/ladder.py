"""The host-memory ladder: observe, throttle, stop and ask, kill the tool call.

Owns what is done to tool calls. The kernel stops a call at its hard budget by itself; here it is decided whether it
gets more, waits or ends. An agent's runtime is never touched, only the calls it made. What escaped from a call that
has ended is answered like the call itself: its phase says ENDED, `stopped_ns` that it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..actions import Action, Candidate, Freeze, Grant, Kill, Thaw, Throttle, Wait
from ..fairness import Share, serve_order, shares
from ..model import MIB, NS_PER_S, Sandbox, TenantId, ToolCall, ToolCallId, ToolCallPhase
from ..policy import LadderRule, Policy, Rung
from ..snapshot import Snapshot
from .grants import Books, holds_memory, leader, promised_bytes, service_order


@dataclass(frozen=True, slots=True)
class Step:
    """What the ladder wants to do to one call, and why; decide() makes a Decision of it."""

    call: ToolCall
    action: Action
    rule: str
    measurement: float
    threshold: float
    unit: str
    evidence: str
    candidates: tuple[Candidate, ...] = ()
    trigger_ns: int | None = None


LEAST_STEP_RATIO = 1 / 8
"""Of a step: where all would stand, the first is granted what room there is, down to this. It may lack no more."""
DYING_NS = 10 * NS_PER_S
"""How long memory of a killed call counts as free. What does not die, hung in the kernel, holds it like any other."""
THROTTLE_AT_LEAST_RATIO = 0.01
"""Of the pool: slowing down a call that holds less than this relieves nobody."""


def climb(snapshot: Snapshot, policy: Policy) -> list[Step]:
    """Steps to take now, the most urgent first. Empty when nothing presses, or nothing is known of the host yet."""
    pool = policy.memory.pool_bytes(snapshot.host.memory_total_bytes)
    if not snapshot.tool_calls or not pool:
        return []
    by_tenant = shares(snapshot, policy)
    answered = _answer_stopped(snapshot, policy, by_tenant, pool)
    about = {step.call.id for step in answered}
    return answered + [s for s in _relieve(snapshot, policy, by_tenant, pool) if s.call.id not in about]


def _answer_stopped(snapshot: Snapshot, policy: Policy, by_tenant: dict[TenantId, Share], pool: int) -> list[Step]:
    """Answer every call that stands at its budget: who is being served already, then least weighted dominant share.

    A call at the largest budget ends. The others are granted a step while there is room and an order is left in which
    all can end (grants.py). Where somebody must make room, because a wait is over or because nobody is left who could
    go on, one payer ends, and who still stands is looked at again with its memory counted as free.
    """
    rank = {tenant: place for place, tenant in enumerate(serve_order(by_tenant))}
    largest = policy.memory.max_bytes
    standing = [c for c in snapshot.tool_calls if c.stopped_ns is not None and holds_memory(c)]
    if not standing:
        return []
    standing.sort(key=lambda c: service_order(c, rank))
    steps = [_kill_at_largest(c, policy, snapshot) for c in standing if _at_largest(c, largest)]
    # What was ended a moment ago is about to be free: its payer must not be followed by another for the same need, and
    # who stands only now is granted out of it like who stood at the moment of the kill. It serves once all the same,
    # since what has been granted since is promised.
    dying = sum(c.used_bytes for c in snapshot.tool_calls if is_dying(c, snapshot.now_ns))
    freed = dying + sum(step.call.used_bytes for step in steps)
    standing = [c for c in standing if not _at_largest(c, largest)]
    while True:
        room = _room_bytes(snapshot, pool) + freed
        ended = {step.call.id for step in steps}
        competing = [c for c in snapshot.tool_calls if holds_memory(c) and c.id not in ended]
        first = leader(competing, rank)
        books = Books(competing, snapshot, policy, pool)
        anyone = any(_goes_on(c) for c in competing)
        granted, unmet, left = _fill(standing, room, first, books, snapshot, policy, others_go_on=anyone)
        going = {step.call.id for step in steps} | {call.id for call, _ in granted}
        payer = _payer(unmet, by_tenant, snapshot, policy, going)
        if payer is None:
            break
        steps.append(_kill_payer(payer, unmet, by_tenant, snapshot, policy))
        freed += payer.used_bytes
        standing = [c for c in standing if c.id != payer.id]
    used = snapshot.tool_used_bytes() - freed
    for call, hard in granted:
        steps.append(_in_line(_grant(call, hard, used, pool, policy), standing))
        used += max(0, hard - call.used_bytes)
    asked = [c for c in unmet if c.waiting_until_ns is None]
    return steps + [_in_line(_wait(c, first, left, snapshot, policy), standing) for c in asked]


def _in_line(step: Step, standing: list[ToolCall]) -> Step:
    """With whom it was weighed against: all that stand, at their places in the order in which they are served."""
    line = [(c.id != step.call.id, Candidate(f"serve {c.kind} of {c.tenant}", n)) for n, c in enumerate(standing, 1)]
    return replace(step, candidates=tuple(each for _, each in sorted(line, key=lambda placed: placed[0])))


def _room_bytes(snapshot: Snapshot, pool: int) -> int:
    """What may still be handed out: of the pool, and never more than the host has. Negative: the pool is overdrawn."""
    promised = sum(promised_bytes(c, snapshot.now_ns) for c in snapshot.tool_calls)
    room = pool - snapshot.tool_used_bytes() - promised
    host = snapshot.host
    return min(room, host.memory_available_bytes - promised) if host.memory_total_bytes else room


def is_dying(call: ToolCall, now_ns: int) -> bool:
    """Whether it was killed a moment ago and its processes are still there."""
    return call.phase is ToolCallPhase.KILLED and call.gone_ns is None and now_ns - call.phase_since_ns < DYING_NS


def _goes_on(call: ToolCall) -> bool:
    return call.running and call.stopped_ns is None and call.phase is not ToolCallPhase.KILLED


def _at_largest(call: ToolCall, largest: int) -> bool:
    return _held(call) >= largest


def _stopped_ns(call: ToolCall) -> int:
    return call.stopped_ns if call.stopped_ns is not None else call.phase_since_ns


def _next_hard_bytes(call: ToolCall, policy: Policy) -> int:
    """The hard budget that the next grant would give."""
    return min(policy.memory.max_bytes, _held(call) + policy.memory.step_bytes)


def _held(call: ToolCall) -> int:
    return max(call.hard_bytes, call.used_bytes)


def _fill(
    standing: list[ToolCall],
    room: int,
    first: ToolCall | None,
    books: Books,
    snapshot: Snapshot,
    policy: Policy,
    *,
    others_go_on: bool,
) -> tuple[list[tuple[ToolCall, int]], list[ToolCall], int]:
    """Who gets what hard budget out of `room` bytes, in the order given, who gets nothing, and what is left.

    A prediction holds nobody up for more than half of the time that it would wait, nor where everybody would stand.
    """
    granted: list[tuple[ToolCall, int]] = []
    unmet = []
    for call in standing:
        hard = _next_hard_bytes(call, policy)
        waited = _waited_ns(call, snapshot) >= policy.wait_ns_for(call) // 2
        last_hope = not (granted or others_go_on)
        served = call is first or waited or last_hope
        if last_hope and call.used_bytes + room >= _held(call) + policy.memory.step_bytes * LEAST_STEP_RATIO:
            hard = min(hard, call.used_bytes + room)
        left = room - (hard - call.used_bytes)
        if left >= 0 and (served or books.is_safe(call, hard, left)):
            room = left
            books.granted(call, hard)
            granted.append((call, hard))
        else:
            unmet.append(call)
    return granted, unmet, room


def _payer(
    unmet: list[ToolCall],
    by_tenant: dict[TenantId, Share],
    snapshot: Snapshot,
    policy: Policy,
    going: set[ToolCallId],
) -> ToolCall | None:
    """Whose call ends to make room, or None: the tenant furthest above its share pays, with its largest call.

    Where a wait is over: out of those whose wait it was and of every call that was granted more than it began with.
    Out of all that stand where no call is left that could go on and free memory. `going` are those that this same
    moment ends or grants.
    """
    over = [c for c in unmet if _waited_ns(c, snapshot) >= policy.wait_ns_for(c)]
    alive = [c for c in snapshot.tool_calls if c.gone_ns is None]
    if over:
        payers = over + [c for c in alive if c.id not in going and c not in over and _holds_a_grant(c, policy)]
    elif going or any(is_dying(c, snapshot.now_ns) or _goes_on(c) for c in alive):
        payers = []
    else:
        payers = unmet
    # Within one tenant a call that stands still goes before one that is getting on.
    return min(payers, key=lambda c: (-by_tenant[c.tenant].weighted, c not in unmet, -c.used_bytes, c.id), default=None)


def _holds_a_grant(call: ToolCall, policy: Policy) -> bool:
    return holds_memory(call) and not call.exempt and call.used_bytes > policy.budget_for(call).hard_bytes


def _pays_first(call: ToolCall, by_tenant: dict[TenantId, Share]) -> tuple[float, int, int]:
    return (-by_tenant[call.tenant].weighted, -call.used_bytes, call.id)


def _waited_ns(call: ToolCall, snapshot: Snapshot) -> int:
    """Time since the kernel stopped it; 0 where it goes on."""
    return snapshot.now_ns - call.stopped_ns if call.stopped_ns is not None else 0


def _grant(call: ToolCall, hard: int, used: int, pool: int, policy: Policy) -> Step:
    soft = int(hard * policy.memory.budget.soft_bytes / policy.memory.budget.hard_bytes)
    return Step(
        call,
        Grant(call.id, soft, hard),
        "tool call at its budget, room in the pool",
        (used + hard - call.used_bytes) / MIB,
        pool / MIB,
        "MiB",
        f"stopped at {_mib(call.used_bytes)}; the pool holds {_mib(used)} of {_mib(pool)}: granted up to {_mib(hard)}",
        # After a wait the time since the stop is the policy's, not the answer's.
        trigger_ns=_stopped_ns(call) if call.waiting_until_ns is None else None,
    )


def _kill_at_largest(call: ToolCall, policy: Policy, snapshot: Snapshot) -> Step:
    largest = policy.memory.max_bytes
    message = (
        f"Equipoise ended this tool call: it reached {_mib(call.peak_bytes)} and the largest budget a tool call may "
        f"have here is {_mib(largest)}. Process the data in smaller parts, or ask the operator for more."
    )
    return Step(
        call,
        Kill(call.id, message),
        "tool call at the largest budget",
        call.used_bytes / MIB,
        largest / MIB,
        "MiB",
        f"reached {_mib(call.used_bytes)} at the largest budget of {_mib(largest)} "
        f"after {call.elapsed_ns(snapshot.now_ns) / NS_PER_S:.1f} s",
        trigger_ns=call.phase_since_ns,
    )


def _wait(call: ToolCall, first: ToolCall | None, left: int, snapshot: Snapshot, policy: Policy) -> Step:
    """`left` is what may still be handed out, for which `first` goes first."""
    memory = policy.memory
    pool, used = memory.pool_bytes(snapshot.host.memory_total_bytes), snapshot.tool_used_bytes()
    needed = _next_hard_bytes(call, policy) - call.used_bytes
    if needed > left or first is None:
        rule, why = "no room in the pool", f"{_mib(max(0, left))} of it can be had"
    else:
        rule = "others go first"
        why = f"{_mib(left)} of it can be had, but then {first.kind} of {first.tenant} might not get through"
    return Step(
        call,
        Wait(call.id, needed, _stopped_ns(call) + policy.wait_ns_for(call)),
        f"tool call at its budget, {rule}",
        (used + needed) / MIB,
        pool / MIB,
        "MiB",
        f"stopped at {_mib(call.used_bytes)} and needs {_mib(needed)}; the pool holds {_mib(used)} of "
        f"{_mib(pool)}, {why}: waits at most {policy.wait_ns_for(call) / NS_PER_S:g} s",
        trigger_ns=_stopped_ns(call),
    )


def _kill_payer(
    call: ToolCall, unmet: list[ToolCall], by_tenant: dict[TenantId, Share], snapshot: Snapshot, policy: Policy
) -> Step:
    """End a call for want of memory. `unmet`: the stopped calls for which there is none."""
    memory = policy.memory
    pool, used = memory.pool_bytes(snapshot.host.memory_total_bytes), snapshot.tool_used_bytes()
    waiter = max(unmet, key=lambda c: _waited_ns(c, snapshot) - policy.wait_ns_for(c))  # the most overdue
    waited = f"{_waited_ns(waiter, snapshot) / NS_PER_S:.1f} s"
    if _waited_ns(waiter, snapshot) < policy.wait_ns_for(waiter):
        rule, why = "every tool call waits for memory", "no call can go on and free some"
    elif _waited_ns(call, snapshot) >= policy.wait_ns_for(call) and call in unmet:
        rule, why = "no memory for a stopped call within its wait", f"it waited {waited}"
    else:
        rule = "no memory for a stopped call within its wait"
        why = f"{waiter.kind} of {waiter.tenant} waited {waited} and this tenant is further above its share"
    share = by_tenant[call.tenant]
    message = (
        f"Equipoise ended this tool call: it held {_mib(call.used_bytes)}, {why}, and the {_mib(pool)} for tool calls "
        f"were in use. Run it again later or with less memory."
    )
    payers = [call, *sorted((c for c in unmet if c is not call), key=lambda c: _pays_first(c, by_tenant))]
    return Step(
        call,
        Kill(call.id, message),
        rule,
        (used + _next_hard_bytes(waiter, policy) - waiter.used_bytes) / MIB,
        pool / MIB,
        "MiB",
        f"{why}; the pool holds {_mib(used)} of {_mib(pool)}; {call.tenant} stands at "
        f"{share.weighted:.2f} of weighted {share.resource} share",
        tuple(Candidate(f"kill {c.kind} of {c.tenant}", -by_tenant[c.tenant].weighted) for c in payers),
    )


_HELD = {Rung.THROTTLE: ToolCallPhase.THROTTLED, Rung.FREEZE: ToolCallPhase.FROZEN}


def _relieve(snapshot: Snapshot, policy: Policy, by_tenant: dict[TenantId, Share], pool: int) -> list[Step]:
    """Hold back one call of whoever is furthest above its share by each rule that presses; let go when it is over."""
    steps = [step for rung in Rung for step in _let_go(rung, snapshot, policy, pool)]
    for rule, since_ns in snapshot.pressed:
        about = {step.call.id for step in steps}
        candidates = [
            c for c in _can_be_held_back(snapshot, pool) if c.id not in about and has_run_for_it(rule, c, snapshot)
        ]
        candidates.sort(key=lambda c: _pays_first(c, by_tenant))
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
            rule.measure.unit if rule else "",
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
    return f"the pool holds {_mib(snapshot.tool_used_bytes())} of {_mib(pool)}"


def subject(call: ToolCall, sandboxes: tuple[Sandbox, ...]) -> str:
    """The call for people: "gold/ada pytest"."""
    label = next((s.label for s in sandboxes if s.cgroup_id == call.sandbox), str(call.tenant))
    return f"{label} {call.kind}"


def _mib(amount: int) -> str:
    return f"{amount / MIB:.0f} MiB"
