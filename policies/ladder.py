"""The host-memory ladder: observe, throttle, stop and ask, kill the tool call.

Owns what is done to tool calls. The kernel stops a call at its hard budget by itself; here it is decided whether it
gets more, waits or ends. An agent's runtime is never touched, only the calls it made.
"""

from __future__ import annotations

from dataclasses import dataclass

from .actions import Action, Candidate, Grant, Kill, Thaw, Throttle, Wait
from .fairness import Share, serve_order, shares
from .model import MIB, NS_PER_S, Sandbox, TenantId, ToolCall, ToolCallPhase
from .policy import Policy
from .snapshot import Snapshot


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


def climb(snapshot: Snapshot, policy: Policy) -> list[Step]:
    """Steps to take now, the most urgent first. Empty when nothing presses."""
    if not snapshot.tool_calls:
        return []
    by_tenant = shares(snapshot, policy)
    return _answer_stopped(snapshot, policy, by_tenant) + _relieve(snapshot, policy, by_tenant)


def _answer_stopped(snapshot: Snapshot, policy: Policy, by_tenant: dict[TenantId, Share]) -> list[Step]:
    """Answer every call that stands at its budget: least weighted dominant share first, then who has waited longest."""
    order = {tenant: rank for rank, tenant in enumerate(serve_order(by_tenant))}
    stopped = [c for c in snapshot.tool_calls if c.phase is ToolCallPhase.STOPPED]
    stopped.sort(key=lambda c: (order.get(c.tenant, len(order)), c.phase_since_ns, c.id))
    memory = policy.memory
    pool = memory.pool_bytes(snapshot.host.memory_total_bytes)
    used = snapshot.tool_used_bytes()
    steps: list[Step] = []
    ended_bytes = 0
    for call in stopped:
        hard = min(memory.max_bytes, max(call.hard_bytes, call.used_bytes) + memory.step_bytes)
        needed = hard - call.used_bytes
        if call.hard_bytes >= memory.max_bytes:
            steps.append(_kill_at_largest(call, policy, snapshot))
            ended_bytes += call.used_bytes
        elif used - ended_bytes + needed <= pool:
            soft = int(hard * memory.budget.soft_bytes / memory.budget.hard_bytes)
            used += needed
            steps.append(
                Step(
                    call,
                    Grant(call.id, soft, hard),
                    "tool call at its budget, room in the pool",
                    used / MIB,
                    pool / MIB,
                    "MiB",
                    f"stopped at {_mib(call.used_bytes)}; the pool holds {_mib(used - needed)} of {_mib(pool)}: "
                    f"granted up to {_mib(hard)}",
                    trigger_ns=call.phase_since_ns,
                )
            )
        else:
            step = _wait_or_kill(call, needed, stopped, by_tenant, snapshot, policy)
            if step is not None:
                steps.append(step)
                ended_bytes += call.used_bytes if isinstance(step.action, Kill) else 0
    return steps


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


def _wait_or_kill(
    call: ToolCall,
    needed: int,
    stopped: list[ToolCall],
    by_tenant: dict[TenantId, Share],
    snapshot: Snapshot,
    policy: Policy,
) -> Step | None:
    """No room: wait, unless it has waited its time, or everybody who holds memory waits too.

    In that deadlock the call of the tenant furthest above its share pays, the largest first.
    """
    memory = policy.memory
    pool = memory.pool_bytes(snapshot.host.memory_total_bytes)
    used = snapshot.tool_used_bytes()
    waited_ns = snapshot.now_ns - call.phase_since_ns
    holders = [c for c in snapshot.tool_calls if c.gone_ns is None and c.phase is not ToolCallPhase.KILLED]
    moving = [c for c in holders if c.running and c.phase is not ToolCallPhase.STOPPED]
    dying = any(c.phase is ToolCallPhase.KILLED and c.gone_ns is None for c in snapshot.tool_calls)
    payers = sorted(stopped, key=lambda c: (-by_tenant[c.tenant].weighted, -c.used_bytes, c.id))
    if waited_ns >= memory.wait_ns:
        rule, why = "no memory for a stopped call within its wait", f"waited {waited_ns / NS_PER_S:.1f} s"
    elif not moving and not dying and payers[0].id == call.id:
        rule, why = "every tool call waits for memory", "no call can go on and free some"
    elif call.waiting_until_ns is None:
        return Step(
            call,
            Wait(call.id, needed, call.phase_since_ns + memory.wait_ns),
            "tool call at its budget, no room in the pool",
            (used + needed) / MIB,
            pool / MIB,
            "MiB",
            f"stopped at {_mib(call.used_bytes)} and needs {_mib(needed)}; the pool holds {_mib(used)} of "
            f"{_mib(pool)}: waits at most {memory.wait_ns / NS_PER_S:.0f} s",
            trigger_ns=call.phase_since_ns,
        )
    else:
        return None
    share = by_tenant[call.tenant]
    message = (
        f"Equipoise ended this tool call: it stood at its budget of {_mib(call.hard_bytes)}, {why}, and the "
        f"{_mib(pool)} for tool calls were in use. Run it again later or with less memory."
    )
    return Step(
        call,
        Kill(call.id, message),
        rule,
        (used + needed) / MIB,
        pool / MIB,
        "MiB",
        f"{why}; the pool holds {_mib(used)} of {_mib(pool)}; {call.tenant} stands at "
        f"{share.weighted:.2f} of weighted {share.resource} share",
        tuple(Candidate(f"kill {c.kind} of {c.tenant}", -by_tenant[c.tenant].weighted) for c in payers),
        trigger_ns=call.phase_since_ns,
    )


def _relieve(snapshot: Snapshot, policy: Policy, by_tenant: dict[TenantId, Share]) -> list[Step]:
    """Under lasting pressure slow down one call of whoever is furthest above its share; let go when it has passed."""
    memory = policy.memory
    pool = memory.pool_bytes(snapshot.host.memory_total_bytes)
    used = snapshot.tool_used_bytes()
    throttled = [c for c in snapshot.tool_calls if c.phase is ToolCallPhase.THROTTLED]
    if snapshot.pressure_since_ns is None:
        return [
            Step(
                c,
                Thaw(c.id),
                f"tool pool below {memory.pressure_below_ratio:.2f}",
                used / pool if pool else 0.0,
                memory.pressure_below_ratio,
                "of the pool",
                f"the pool holds {_mib(used)} of {_mib(pool)}",
            )
            for c in throttled
        ]
    pressed_ns = snapshot.now_ns - snapshot.pressure_since_ns
    since_last_ns = min((snapshot.now_ns - c.phase_since_ns for c in throttled), default=pressed_ns)
    if min(pressed_ns, since_last_ns) < memory.pressure_for_ns:
        return []
    running = [c for c in snapshot.tool_calls if c.phase is ToolCallPhase.RUNNING]
    running.sort(key=lambda c: (-by_tenant[c.tenant].weighted, -c.used_bytes, c.id))
    if not running:
        return []
    call = running[0]
    share = by_tenant[call.tenant]
    return [
        Step(
            call,
            Throttle(call.id, call.used_bytes, memory.throttle_cpu_ratio, snapshot.now_ns + memory.throttle_ns),
            f"tool pool above {memory.pressure_above_ratio:.2f} for {memory.pressure_for_ns / NS_PER_S:g}s",
            used / pool,
            memory.pressure_above_ratio,
            "of the pool",
            f"the pool holds {_mib(used)} of {_mib(pool)}; {call.tenant} is furthest above its share "
            f"({share.weighted:.2f} weighted {share.resource})",
            tuple(Candidate(f"throttle {c.kind} of {c.tenant}", -by_tenant[c.tenant].weighted) for c in running),
            trigger_ns=snapshot.pressure_since_ns,
        )
    ]


def subject(call: ToolCall, sandboxes: tuple[Sandbox, ...]) -> str:
    """The call for people: "gold/ada pytest"."""
    label = next((s.label for s in sandboxes if s.cgroup_id == call.sandbox), str(call.tenant))
    return f"{label} {call.kind}"


def _mib(amount: int) -> str:
    return f"{amount / MIB:.0f} MiB"
