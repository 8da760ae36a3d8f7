"""EngineReport messages <-> the core's facts. Owns the translation and nothing else."""

from __future__ import annotations

from ..policies.accounting import TurnCost
from ..policies.events import Event, KvObserved, SessionMoved, TurnEnded, TurnPreempted, TurnStarted
from ..policies.model import (
    CostModel,
    Engine,
    EngineId,
    EngineTotals,
    FinishReason,
    KvTier,
    Session,
    SessionId,
    SessionPhase,
    TenantId,
)
from .api.v1 import engine_pb2 as pb

KV_TIER = {
    pb.KV_TIER_DEVICE: KvTier.DEVICE,
    pb.KV_TIER_HOST: KvTier.HOST,
    pb.KV_TIER_DISK: KvTier.DISK,
    pb.KV_TIER_NONE: KvTier.NONE,
}
KV_TIER_TO_PB = {tier: number for number, tier in KV_TIER.items()}
SESSION_PHASE = {
    pb.SESSION_PHASE_WAITING: SessionPhase.WAITING,
    pb.SESSION_PHASE_RUNNING: SessionPhase.RUNNING,
    pb.SESSION_PHASE_IDLE: SessionPhase.IDLE,
    pb.SESSION_PHASE_HELD: SessionPhase.HELD,
}
SESSION_PHASE_TO_PB = {phase: number for number, phase in SESSION_PHASE.items()}
FINISH_REASON = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_ERROR: FinishReason.ERROR,
}
FINISH_REASON_TO_PB = {reason: number for number, reason in FINISH_REASON.items()}


def engine_of(hello: pb.EngineHello) -> Engine:
    """The engine that says hello. Negative numbers count as 0."""
    return Engine(
        id=EngineId(hello.engine_id),
        kind=hello.kind or "unknown",
        model=hello.model,
        pid=hello.pid,
        bytes_per_token=max(0, hello.bytes_per_token),
        device_capacity_tokens=max(0, hello.device_capacity_tokens),
        host_capacity_bytes=max(0, hello.host_capacity_bytes),
        disk_capacity_bytes=max(0, hello.disk_capacity_bytes),
        cost=cost_of(hello.cost),
        supported_directives=frozenset(hello.supported_directives),
    )


def cost_of(cost: pb.CostModel) -> CostModel:
    return CostModel(
        prefill_seconds_per_token=cost.prefill_seconds_per_token,
        prefill_seconds_per_token2=cost.prefill_seconds_per_token2,
        decode_step_seconds=cost.decode_step_seconds,
        decode_seconds_per_sequence=cost.decode_seconds_per_sequence,
        host_bytes_per_second=cost.host_bytes_per_second,
        disk_bytes_per_second=cost.disk_bytes_per_second,
    )


def turn_cost_of(cost: pb.TurnCost) -> TurnCost:
    """What an ended turn cost; what the engine left out stays None, never 0."""
    return TurnCost(
        pte=cost.pte if cost.HasField("pte") else None,
        wasted_pte=cost.wasted_pte,
        energy_joules=cost.energy_joules if cost.HasField("energy_joules") else None,
        duration_ns=cost.duration_ns,
        ideal_ns=cost.ideal_ns if cost.HasField("ideal_ns") else None,
    )


def turn_cost_message(cost: TurnCost) -> pb.TurnCost:
    """The other way: None is left out."""
    return pb.TurnCost(
        pte=cost.pte,
        wasted_pte=cost.wasted_pte,
        energy_joules=cost.energy_joules,
        duration_ns=cost.duration_ns,
        ideal_ns=cost.ideal_ns,
    )


def event_of(report: pb.EngineReport, engine: EngineId) -> Event | None:
    """The event a report stands for; None for one that this version does not know."""
    match report.WhichOneof("report"):
        case "occupancy":
            return _kv_observed(report.at_ns, report.occupancy, engine)
        case "turn_started":
            started = report.turn_started
            return TurnStarted(
                at_ns=report.at_ns,
                engine=engine,
                session=SessionId(started.session_id),
                turn=started.turn_id,
                prompt_tokens=started.prompt_tokens,
                cached_tokens=started.cached_tokens,
                peer_port=started.peer_port or None,
            )
        case "turn_ended":
            ended = report.turn_ended
            return TurnEnded(
                at_ns=report.at_ns,
                engine=engine,
                session=SessionId(ended.session_id),
                turn=ended.turn_id,
                finish_reason=FINISH_REASON.get(ended.finish_reason, FinishReason.ERROR),
                prompt_tokens=ended.prompt_tokens,
                cached_tokens=ended.cached_tokens,
                recomputed_tokens=ended.recomputed_tokens,
                output_tokens=ended.output_tokens,
                ttft_ns=ended.ttft_ns,
                queued_ns=ended.queued_ns,
                cost=turn_cost_of(ended.cost),
            )
        case "session_moved":
            moved = report.session_moved
            return SessionMoved(
                at_ns=report.at_ns,
                engine=engine,
                session=SessionId(moved.session_id),
                from_tier=KV_TIER.get(moved.from_tier, KvTier.NONE),
                to_tier=KV_TIER.get(moved.to_tier, KvTier.NONE),
                tokens=moved.tokens,
                moved_bytes=moved.moved_bytes,
                duration_ns=moved.duration_ns,
                directive=moved.directive_id or None,
            )
        case "turn_preempted":
            preempted = report.turn_preempted
            return TurnPreempted(
                at_ns=report.at_ns,
                engine=engine,
                session=SessionId(preempted.session_id),
                turn=preempted.turn_id,
                to_tier=KV_TIER.get(preempted.to_tier, KvTier.NONE),
                directive=preempted.directive_id or None,
            )
        case _:
            return None


def _kv_observed(at_ns: int, seen: pb.Occupancy, engine: EngineId) -> KvObserved:
    return KvObserved(
        at_ns=at_ns,
        engine=engine,
        sessions=tuple(_session_of(kv, engine, at_ns) for kv in seen.sessions),
        device_used_tokens=seen.device_used_tokens,
        host_used_bytes=seen.host_used_bytes,
        disk_used_bytes=seen.disk_used_bytes,
        device_capacity_tokens=seen.device_capacity_tokens,
        host_capacity_bytes=seen.host_capacity_bytes,
        running_count=seen.running_count,
        waiting_count=seen.waiting_count,
        totals=EngineTotals(
            prefill_tokens=seen.totals.prefill_tokens,
            decode_tokens=seen.totals.decode_tokens,
            cached_tokens=seen.totals.cached_tokens,
            recomputed_tokens=seen.totals.recomputed_tokens,
            swap_out_count=seen.totals.swap_out_count,
            swap_out_bytes=seen.totals.swap_out_bytes,
            swap_out_ns=seen.totals.swap_out_ns,
            swap_in_count=seen.totals.swap_in_count,
            swap_in_bytes=seen.totals.swap_in_bytes,
            swap_in_ns=seen.totals.swap_in_ns,
            preempted_count=seen.totals.preempted_count,
        ),
        cost=cost_of(seen.cost) if seen.HasField("cost") else None,
    )


def _session_of(kv: pb.SessionKv, engine: EngineId, at_ns: int) -> Session:
    return Session(
        id=SessionId(kv.session_id),
        tenant=TenantId(kv.tenant_id),
        engine=engine,
        phase=SESSION_PHASE.get(kv.phase, SessionPhase.IDLE),
        tier=KV_TIER.get(kv.tier, KvTier.NONE),
        held_tokens=kv.held_tokens,
        context_tokens=max(kv.context_tokens, kv.held_tokens),
        host_bytes=kv.host_bytes,
        disk_bytes=kv.disk_bytes,
        retain_until_ns=kv.retain_until_ns,
        shared_tokens=kv.shared_tokens,
        observed_ns=at_ns,
    )
