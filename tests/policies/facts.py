"""Literals for the tests of the pure core: one short way to write each fact.

Owns defaults that no test asserts on. Times are given in seconds and become nanoseconds; sizes in MiB become bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from equipoise.policies.accounting import TurnCost
from equipoise.policies.actions import Action, Decision, Outcome, OutcomeStatus
from equipoise.policies.estimate import Estimates
from equipoise.policies.events import (
    BudgetLevel,
    BudgetReached,
    DecisionMade,
    EngineAttached,
    HostSampled,
    KvObserved,
    OutcomeObserved,
    SandboxRegistered,
    SessionMoved,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallStarted,
    TurnEnded,
    TurnStarted,
)
from equipoise.policies.model import (
    MIB,
    NS_PER_S,
    CgroupId,
    CostModel,
    DecisionId,
    Engine,
    EngineId,
    EngineTotals,
    FinishReason,
    Host,
    KvTier,
    Sandbox,
    Session,
    SessionId,
    SessionPhase,
    Tenant,
    TenantId,
    ToolCall,
    ToolCallId,
    ToolCallPhase,
    ToolCallSource,
)
from equipoise.policies.policy import Budget, MemoryPolicy, Policy
from equipoise.policies.snapshot import Snapshot
from equipoise.policies.state import State

EVERY_DIRECTIVE = frozenset(
    {"set_tenant_weight", "swap_out", "swap_in", "retain", "drop", "hold", "release", "set_host_tier_capacity"}
)
ENGINE = EngineId("e1")
ADA = SessionId("gold/ada")
BYTES_PER_TOKEN = 1 << 10


def learned(peak_mib: int, kind: str = "pytest", count: int = 20) -> Estimates:
    """After so many calls of that kind and that peak."""
    known = Estimates()
    for _ in range(count):
        known = known.observe(kind, NS_PER_S, peak_mib * MIB)
    return known


def ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def sandbox(cgroup: int = 1, tenant: str = "gold", name: str = "ada", **more: Any) -> Sandbox:
    return Sandbox(
        cgroup_id=CgroupId(cgroup),
        tenant=TenantId(tenant),
        name=name,
        path=f"equipoise/{tenant}/{name}",
        session=SessionId(f"{tenant}/{name}"),
        agent_pid=1000 + cgroup,
        registered_ns=0,
        **more,
    )


def call(
    id: int = 1,
    tenant: str = "gold",
    used_mib: int = 0,
    hard_mib: int = 512,
    start_s: float = 0.0,
    session: str = "s1",
    **more: Any,
) -> ToolCall:
    more.setdefault("kind", "pytest")
    more.setdefault("command", more["kind"])
    return ToolCall(
        id=ToolCallId(id),
        tenant=TenantId(tenant),
        sandbox=CgroupId(1),
        session=SessionId(session),
        source=ToolCallSource.LINEAGE,
        confidence=0.8,
        start_ns=ns(start_s),
        used_bytes=used_mib * MIB,
        peak_bytes=used_mib * MIB,
        soft_bytes=hard_mib * MIB // 2,
        hard_bytes=hard_mib * MIB,
        **more,
    )


def stopped(id: int = 1, tenant: str = "gold", used_mib: int = 512, since_s: float = 0.0, **more: Any) -> ToolCall:
    more.setdefault("hard_mib", used_mib)
    made = call(id, tenant, used_mib, phase=ToolCallPhase.STOPPED, stopped_ns=ns(since_s), **more)
    return replace(made, phase_since_ns=ns(since_s))


def engine(id: str = ENGINE, used_tokens: int = 0, capacity_tokens: int = 1 << 20, **more: Any) -> Engine:
    values: dict[str, Any] = {
        "kind": "embedded",
        "model": "tiny",
        "pid": 1,
        "bytes_per_token": BYTES_PER_TOKEN,
        "host_capacity_bytes": 1 << 30,
        "disk_capacity_bytes": 0,
        "cost": CostModel(),
        "supported_directives": EVERY_DIRECTIVE,
    }
    return Engine(
        id=EngineId(id),
        device_capacity_tokens=capacity_tokens,
        device_used_tokens=used_tokens,
        **(values | more),
    )


def session(id: str = "s1", tenant: str = "gold", held_tokens: int = 1000, **more: Any) -> Session:
    values: dict[str, Any] = {
        "engine": ENGINE,
        "phase": SessionPhase.IDLE,
        "tier": KvTier.DEVICE,
        "context_tokens": held_tokens,
    }
    return Session(id=SessionId(id), tenant=TenantId(tenant), held_tokens=held_tokens, **(values | more))


def policy(pool_mib: int = 1024, tenants: dict[str, float] | None = None, **memory: Any) -> Policy:
    """A pool in MiB and `budget 512 MiB, max 1024 MiB, step 256 MiB`, unless said otherwise."""
    values: dict[str, Any] = {
        "tool_pool_bytes": pool_mib * MIB,
        "budget": Budget(384 * MIB, 512 * MIB),
        "max_bytes": 1024 * MIB,
        "step_bytes": 256 * MIB,
    }
    weights = tenants or {"gold": 1.0, "silver": 1.0}
    return Policy(
        tenants=tuple(Tenant(TenantId(name), weight) for name, weight in weights.items()),
        memory=MemoryPolicy(**(values | memory)),
    )


def host(total_mib: int = 16_384, available_mib: int = 16_384, **more: Any) -> Host:
    return Host(memory_total_bytes=total_mib * MIB, memory_available_bytes=available_mib * MIB, **more)


def snapshot(now_s: float = 0.0, of: Policy | None = None, **more: Any) -> Snapshot:
    """`pressure_since_ns`: every rule of the ladder presses since then; None: none does."""
    of = of or policy()
    more.setdefault("tenants", of.tenants)
    since_ns = more.pop("pressure_since_ns", None)
    if since_ns is not None:
        more["pressed"] = tuple((rule, since_ns) for rule in of.memory.ladder)
    return Snapshot(now_ns=ns(now_s), host=more.pop("host", host()), **more)


# -- events


def started(
    at_s: float = 0.0, id: int = 1, cgroup: int = 1, command: str = "pytest -q", **more: Any
) -> ToolCallStarted:
    values: dict[str, Any] = {"source": ToolCallSource.LINEAGE, "confidence": 0.8, "pid": 4000 + id}
    return ToolCallStarted(
        at_ns=ns(at_s), id=ToolCallId(id), sandbox=CgroupId(cgroup), command=command, **(values | more)
    )


def stepped(at_s: float, used_mib: int, peak_mib: int | None = None, id: int = 1) -> ToolCallMemoryStepped:
    peak = used_mib if peak_mib is None else peak_mib
    return ToolCallMemoryStepped(ns(at_s), ToolCallId(id), used_mib * MIB, peak * MIB)


def reached(
    at_s: float, used_mib: int = 512, budget_mib: int = 512, id: int = 1, level: BudgetLevel = BudgetLevel.HARD
) -> BudgetReached:
    return BudgetReached(ns(at_s), ToolCallId(id), level, budget_mib * MIB, used_mib * MIB, 4000 + id)


def ended(at_s: float, id: int = 1, exit_code: int | None = 0, signal: int | None = None, **more: Any) -> ToolCallEnded:
    return ToolCallEnded(ns(at_s), ToolCallId(id), exit_code, signal, **more)


def observed(at_s: float, *sessions: Session, engine: str = ENGINE, **more: Any) -> KvObserved:
    values: dict[str, Any] = {
        "device_used_tokens": sum(s.device_tokens() for s in sessions),
        "host_used_bytes": sum(s.host_bytes for s in sessions),
        "disk_used_bytes": 0,
        "device_capacity_tokens": 1 << 20,
        "host_capacity_bytes": 1 << 30,
        "running_count": 0,
        "waiting_count": 0,
        "totals": EngineTotals(),
    }
    return KvObserved(ns(at_s), EngineId(engine), tuple(sessions), **(values | more))


def turn_started(at_s: float, turn: str = "t1", session: SessionId = ADA, **more: Any) -> TurnStarted:
    return TurnStarted(ns(at_s), ENGINE, session, turn, prompt_tokens=10, cached_tokens=0, **more)


def turn_ended(
    at_s: float,
    reason: FinishReason = FinishReason.TOOL_CALLS,
    cost: TurnCost | None = None,
    session: SessionId = ADA,
) -> TurnEnded:
    return TurnEnded(ns(at_s), ENGINE, session, "t1", reason, 10, 0, 0, 5, 0, 0, cost or TurnCost())


def moved(at_s: float, to: KvTier, directive: str | None = None) -> SessionMoved:
    return SessionMoved(ns(at_s), ENGINE, ADA, KvTier.DEVICE, to, 1000, 1000, 1, directive)


def host_sampled(at_s: float = 0.0, total_mib: int = 16_384, available_mib: int = 8_192) -> HostSampled:
    return HostSampled(ns(at_s), total_mib * MIB, available_mib * MIB, None, None)


def decision(action: Action, at_s: float = 0.0, id: str = "d1", tenant: str = "gold") -> Decision:
    return Decision(DecisionId(id), ns(at_s), "a rule", 1.0, 0.5, "MiB", action, TenantId(tenant), "gold/ada", "why")


def decided(action: Action, at_s: float = 0.0, id: str = "d1") -> DecisionMade:
    return DecisionMade(ns(at_s), decision(action, at_s, id))


def came_of_it(status: OutcomeStatus, at_s: float = 0.0, id: str = "d1") -> OutcomeObserved:
    return OutcomeObserved(ns(at_s), Outcome(DecisionId(id), status, ns(at_s), "test"))


def carry_out(state: State, action: Action, at_s: float, id: str = "d1") -> None:
    """Decide `action` and report it completed."""
    state.apply(decided(action, at_s, id)).apply(came_of_it(OutcomeStatus.COMPLETED, at_s, id))


def state_with_a_call(used_mib: int = 0, **more: Any) -> State:
    """A sandbox of `gold`, an engine, its idle session with 1000 tokens, and call 1 running since 0 s."""
    state = State(policy())
    state.apply(SandboxRegistered(0, sandbox()))
    state.apply(EngineAttached(0, engine()))
    state.apply(host_sampled())
    state.apply(observed(0.0, session("gold/ada")))
    state.apply(started(0.0, hard_bytes=512 * MIB, soft_bytes=384 * MIB, **more))
    if used_mib:
        state.apply(stepped(0.0, used_mib))
    return state


def the_call(state: State, id: int = 1) -> ToolCall:
    return state.tool_calls[ToolCallId(id)]
