"""The host-memory ladder: observe, throttle, stop and ask, kill the tool call.

Owns what is done to tool calls. The kernel stops a call at its hard budget by itself; here it is decided whether it
gets more, waits or ends; what is held back under pressure, in relief.py. An agent's runtime is never touched, only the
calls it made. What escaped from a call that has ended is answered like the call itself: its phase says ENDED,
`stopped_ns` that it stands.
"""

from __future__ import annotations

from dataclasses import replace

from ..actions import Candidate, Grant, Kill, Wait
from ..fairness import Share, serve_order, shares
from ..model import MIB, NS_PER_S, TenantId, ToolCall, ToolCallId, ToolCallPhase
from ..policy import Policy
from ..snapshot import Snapshot
from .grants import Books, holds_memory, leader, promised_bytes, service_order
from .relief import relieve
from .step import Step, mib, pays_first

LEAST_STEP_RATIO = 1 / 8
"""Of a step: where all would stand, the first is granted what room there is, down to this. It may lack no more."""
DYING_NS = 10 * NS_PER_S
"""How long memory of a killed call counts as free. What does not die, hung in the kernel, holds it like any other."""


def climb(snapshot: Snapshot, policy: Policy) -> list[Step]:
    """Steps to take now, the most urgent first. Empty when nothing presses, or nothing is known of the host yet."""
    pool = policy.memory.pool_bytes(snapshot.host.memory_total_bytes)
    if not snapshot.tool_calls or not pool:
        return []
    by_tenant = shares(snapshot, policy)
    answered = _answer_stopped(snapshot, policy, by_tenant, pool)
    about = {step.call.id for step in answered}
    return answered + [s for s in relieve(snapshot, policy, by_tenant, pool) if s.call.id not in about]


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
    over, standing = (
        [c for c in standing if _at_largest(c, largest)],
        [c for c in standing if not _at_largest(c, largest)],
    )
    bent = _bend(over, standing, _room_bytes(snapshot, pool), policy)
    steps = [_kill_at_largest(c, policy, snapshot) for c in over if c.id not in bent]
    # What was ended a moment ago is about to be free: its payer must not be followed by another for the same need, and
    # who stands only now is granted out of it like who stood at the moment of the kill. It serves once all the same,
    # since what has been granted since is promised.
    dying = sum(c.used_bytes for c in snapshot.tool_calls if is_dying(c, snapshot.now_ns))
    freed = dying + sum(step.call.used_bytes for step in steps)
    freed -= sum(bent[c.id] - c.used_bytes for c in over if c.id in bent)
    while True:
        room = _room_bytes(snapshot, pool) + freed
        ended = {step.call.id for step in steps}
        competing = [c for c in snapshot.tool_calls if holds_memory(c) and c.id not in ended]
        first = leader(competing, rank)
        books = Books(competing, snapshot, policy, pool)
        anyone = bool(bent) or any(_goes_on(c) for c in competing)
        granted, unmet, left = _fill(standing, room, first, books, snapshot, policy, others_go_on=anyone)
        going = {step.call.id for step in steps} | {call.id for call, _ in granted} | bent.keys()
        payer = _payer(unmet, by_tenant, snapshot, policy, going)
        if payer is None:
            break
        steps.append(_kill_payer(payer, unmet, by_tenant, snapshot, policy))
        freed += payer.used_bytes
        standing = [c for c in standing if c.id != payer.id]
    used = snapshot.tool_used_bytes() - freed
    steps += [_grant_past_largest(c, bent[c.id], used, pool, policy) for c in over if c.id in bent]
    for call, hard in granted:
        steps.append(_in_line(_grant(call, hard, used, pool, policy), standing))
        used += max(0, hard - call.used_bytes)
    asked = [c for c in unmet if c.waiting_until_ns is None]
    return steps + [_in_line(_wait(c, first, left, snapshot, policy), standing) for c in asked]


def _bend(over: list[ToolCall], others: list[ToolCall], room: int, policy: Policy) -> dict[ToolCallId, int]:
    """Calls at the largest budget that get a step more all the same, and the hard budget they get, in bytes.

    Where nobody else needs the memory: all others that stand could have their step and any one of them, or of those to
    come, could still reach the largest budget. So no order of ending that there was is lost.
    """
    if not policy.memory.bends:
        return {}
    left = room - sum(_next_hard_bytes(c, policy) - c.used_bytes for c in others)
    bent = {}
    for call in over:
        hard = _held(call) + policy.memory.step_bytes
        if left - (hard - call.used_bytes) >= policy.memory.max_bytes:
            left -= hard - call.used_bytes
            bent[call.id] = hard
    return bent


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
        f"stopped at {mib(call.used_bytes)}; the pool holds {mib(used)} of {mib(pool)}: granted up to {mib(hard)}",
        # After a wait the time since the stop is the policy's, not the answer's.
        trigger_ns=_stopped_ns(call) if call.waiting_until_ns is None else None,
    )


def _grant_past_largest(call: ToolCall, hard: int, used: int, pool: int, policy: Policy) -> Step:
    evidence = (
        f"stopped at {mib(call.used_bytes)}, the largest budget is {mib(policy.memory.max_bytes)}; the pool holds "
        f"{mib(used)} of {mib(pool)} and another call could still have as much: granted up to {mib(hard)}"
    )
    rule = "tool call at the largest budget, nobody else needs the memory"
    return replace(_grant(call, hard, used, pool, policy), rule=rule, evidence=evidence)


def _kill_at_largest(call: ToolCall, policy: Policy, snapshot: Snapshot) -> Step:
    largest = policy.memory.max_bytes
    message = (
        f"Equipoise ended this tool call: it reached {mib(call.peak_bytes)} and the largest budget a tool call may "
        f"have here is {mib(largest)}. Process the data in smaller parts, or ask the operator for more."
    )
    return Step(
        call,
        Kill(call.id, message),
        "tool call at the largest budget",
        call.used_bytes / MIB,
        largest / MIB,
        "MiB",
        f"reached {mib(call.used_bytes)} at the largest budget of {mib(largest)} "
        f"after {call.elapsed_ns(snapshot.now_ns) / NS_PER_S:.1f} s",
        trigger_ns=call.phase_since_ns,
    )


def _wait(call: ToolCall, first: ToolCall | None, left: int, snapshot: Snapshot, policy: Policy) -> Step:
    """`left` is what may still be handed out, for which `first` goes first."""
    memory = policy.memory
    pool, used = memory.pool_bytes(snapshot.host.memory_total_bytes), snapshot.tool_used_bytes()
    needed = _next_hard_bytes(call, policy) - call.used_bytes
    if needed > left or first is None:
        rule, why = "no room in the pool", f"{mib(max(0, left))} of it can be had"
    else:
        rule = "others go first"
        why = f"{mib(left)} of it can be had, but then {first.kind} of {first.tenant} might not get through"
    return Step(
        call,
        Wait(call.id, needed, _stopped_ns(call) + policy.wait_ns_for(call)),
        f"tool call at its budget, {rule}",
        (used + needed) / MIB,
        pool / MIB,
        "MiB",
        f"stopped at {mib(call.used_bytes)} and needs {mib(needed)}; the pool holds {mib(used)} of "
        f"{mib(pool)}, {why}: waits at most {policy.wait_ns_for(call) / NS_PER_S:g} s",
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
        f"Equipoise ended this tool call: it held {mib(call.used_bytes)}, {why}, and the {mib(pool)} for tool calls "
        f"were in use. Run it again later or with less memory."
    )
    payers = [call, *sorted((c for c in unmet if c is not call), key=lambda c: pays_first(c, by_tenant))]
    return Step(
        call,
        Kill(call.id, message),
        rule,
        (used + _next_hard_bytes(waiter, policy) - waiter.used_bytes) / MIB,
        pool / MIB,
        "MiB",
        f"{why}; the pool holds {mib(used)} of {mib(pool)}; {call.tenant} stands at "
        f"{share.weighted:.2f} of weighted {share.resource} share",
        tuple(Candidate(f"kill {c.kind} of {c.tenant}", -by_tenant[c.tenant].weighted) for c in payers),
    )
