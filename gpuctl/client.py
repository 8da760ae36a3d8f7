"""The engine's end of the hook: dials the daemon, reports, and hands its directives to the engine.

Owns: the connection, its retries, and the translation between the engine's dataclasses and engine.proto. Must not:
decide anything. Fail-open: without a daemon the engine serves on by its own defaults; whenever a stream is lost, every
hold the daemon made ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

import grpc
import grpc.aio

from ..policies.model import CostModel, EngineTotals, KvTier, SessionId, TenantId
from . import directives as ask
from .api.v1 import engine_pb2 as pb
from .api.v1 import engine_pb2_grpc
from .directives import Directive, Outcome, OutcomeStatus, PreemptMode
from .engine.engine import Engine
from .messages import FINISH_REASON_TO_PB, KV_TIER, KV_TIER_TO_PB, SESSION_PHASE_TO_PB, turn_cost_message
from .reports import (
    EngineFacts,
    Occupancy,
    Reported,
    SessionKv,
    SessionMoved,
    TurnEnded,
    TurnPreempted,
    TurnStarted,
)

_log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 3.0
# A daemon that stops reading must not grow the engine's memory; the next occupancy is a full picture again.
_MAX_QUEUED_REPORTS = 4096
_DEFAULT_LIFE_NS = 60 * 10**9


async def attach(address: str, engine: Engine) -> None:
    """Stay attached to the daemon at `address` (`unix:/path`) until cancelled; retry with backoff for ever."""
    retry_s = FIRST_RETRY_S
    while True:
        connected_at = time.monotonic()
        try:
            await _one_stream(address, engine)
            reason = "the daemon closed the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            engine.release_holds()
        if time.monotonic() - connected_at > LONGEST_RETRY_S:
            retry_s = FIRST_RETRY_S
        _log.info("detached address=%s reason=%r retry_s=%.1f", address, reason, retry_s)
        await asyncio.sleep(retry_s * random.uniform(0.8, 1.2))  # engines of one host must not dial in step
        retry_s = min(LONGEST_RETRY_S, retry_s * 2)


async def _one_stream(address: str, engine: Engine) -> None:
    """Serve one stream to its end. Raises AioRpcError where it could not be opened or was cut."""
    loop = asyncio.get_running_loop()
    reports: asyncio.Queue[pb.EngineReport] = asyncio.Queue(_MAX_QUEUED_REPORTS)

    def put(message: pb.EngineReport) -> None:
        if reports.full():
            reports.get_nowait()
            _log.warning("report_lost kind=%s", message.WhichOneof("report"))
        reports.put_nowait(message)

    def carry(reported: Reported) -> None:
        try:
            loop.call_soon_threadsafe(put, report_message(reported))
        except RuntimeError:
            pass  # the loop is closed: the process is going down

    async with grpc.aio.insecure_channel(address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
        await call.write(hello_message(engine.facts()))
        stop_listening = engine.listen(carry)
        writer = asyncio.create_task(_write(call, reports))
        try:
            async for message in call:
                _take(message, engine, put)
        finally:
            stop_listening()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()


async def _write(
    call: grpc.aio.StreamStreamCall[pb.EngineReport, pb.EngineDirective], reports: asyncio.Queue[pb.EngineReport]
) -> None:
    while True:
        await call.write(await reports.get())


def _take(message: pb.EngineDirective, engine: Engine, put: Callable[[pb.EngineReport], None]) -> None:
    directive = directive_from(message, time.monotonic_ns())
    if directive is None:
        kind = message.WhichOneof("directive")
        outcome = Outcome(message.directive_id, OutcomeStatus.REJECTED, f"directive {kind}: not known to this engine")
        put(report_message(Reported(time.monotonic_ns(), outcome)))
        return
    engine.direct(directive)


# Translation


def directive_from(message: pb.EngineDirective, now_ns: int) -> Directive | None:
    """The directive of a message; None for a kind this engine does not know."""
    kind = message.WhichOneof("directive")
    if kind is None:
        return None
    body = getattr(message, kind)
    name, deadline_ns = message.directive_id, message.deadline_ns or now_ns + _DEFAULT_LIFE_NS
    match kind:
        case "set_tenant_weight":
            return ask.SetTenantWeight(
                directive_id=name, deadline_ns=deadline_ns, tenant_id=TenantId(body.tenant_id), weight=body.weight
            )
        case "set_capacity":
            return ask.SetCapacity(directive_id=name, deadline_ns=deadline_ns, device_tokens=body.device_tokens)
        case "set_host_tier_capacity":
            return ask.SetHostTierCapacity(directive_id=name, deadline_ns=deadline_ns, host_bytes=body.host_bytes)
    session_id = SessionId(body.session_id)
    match kind:
        case "hold":
            return ask.Hold(directive_id=name, deadline_ns=deadline_ns, session_id=session_id, ttl_ns=body.ttl_ns)
        case "release":
            return ask.Release(directive_id=name, deadline_ns=deadline_ns, session_id=session_id)
        case "preempt":
            swap = body.mode == pb.PREEMPT_MODE_SWAP
            mode = PreemptMode.SWAP if swap else PreemptMode.RECOMPUTE
            return ask.Preempt(directive_id=name, deadline_ns=deadline_ns, session_id=session_id, mode=mode)
        case "swap_out":
            tier = KV_TIER.get(body.tier, KvTier.HOST)
            return ask.SwapOut(directive_id=name, deadline_ns=deadline_ns, session_id=session_id, tier=tier)
        case "swap_in":
            return ask.SwapIn(directive_id=name, deadline_ns=deadline_ns, session_id=session_id)
        case "retain":
            return ask.Retain(directive_id=name, deadline_ns=deadline_ns, session_id=session_id, ttl_ns=body.ttl_ns)
        case "drop":
            return ask.Drop(
                directive_id=name, deadline_ns=deadline_ns, session_id=session_id, from_token=body.from_token
            )
    return None


def hello_message(facts: EngineFacts) -> pb.EngineReport:
    hello = pb.EngineHello(
        engine_id=facts.engine_id,
        kind="embedded",
        model=facts.model,
        pid=facts.pid,
        bytes_per_token=facts.bytes_per_token,
        device_capacity_tokens=facts.device_capacity_tokens,
        host_capacity_bytes=facts.host_capacity_bytes,
        disk_capacity_bytes=facts.disk_capacity_bytes,
        cost=_cost(facts.cost),
        supported_directives=[field.name for field in pb.EngineDirective.DESCRIPTOR.oneofs[0].fields],
    )
    return pb.EngineReport(at_ns=time.monotonic_ns(), hello=hello)


def report_message(reported: Reported) -> pb.EngineReport:
    message = pb.EngineReport(at_ns=reported.at_ns)
    match reported.report:
        case Occupancy() as occupancy:
            message.occupancy.CopyFrom(_occupancy(occupancy))
        case TurnStarted() as started:
            message.turn_started.CopyFrom(
                pb.TurnStarted(
                    session_id=started.session_id,
                    tenant_id=started.tenant_id,
                    turn_id=started.turn_id,
                    prompt_tokens=started.prompt_tokens,
                    cached_tokens=started.cached_tokens,
                    peer_port=started.peer_port or 0,
                )
            )
        case TurnEnded() as ended:
            message.turn_ended.CopyFrom(
                pb.TurnEnded(
                    session_id=ended.session_id,
                    tenant_id=ended.tenant_id,
                    turn_id=ended.turn_id,
                    finish_reason=FINISH_REASON_TO_PB[ended.finish_reason],
                    prompt_tokens=ended.prompt_tokens,
                    cached_tokens=ended.cached_tokens,
                    recomputed_tokens=ended.recomputed_tokens,
                    output_tokens=ended.output_tokens,
                    ttft_ns=ended.ttft_ns or 0,
                    queued_ns=ended.queued_ns,
                    cost=turn_cost_message(ended.cost),
                )
            )
        case SessionMoved() as moved:
            message.session_moved.CopyFrom(
                pb.SessionMoved(
                    session_id=moved.session_id,
                    tenant_id=moved.tenant_id,
                    from_tier=KV_TIER_TO_PB[moved.from_tier],
                    to_tier=KV_TIER_TO_PB[moved.to_tier],
                    tokens=moved.tokens,
                    moved_bytes=moved.moved_bytes,
                    duration_ns=moved.duration_ns,
                    directive_id=moved.directive_id,
                )
            )
        case TurnPreempted() as preempted:
            message.turn_preempted.CopyFrom(
                pb.TurnPreempted(
                    session_id=preempted.session_id,
                    tenant_id=preempted.tenant_id,
                    turn_id=preempted.turn_id,
                    to_tier=KV_TIER_TO_PB[preempted.to_tier],
                    directive_id=preempted.directive_id,
                )
            )
        case Outcome() as outcome:
            message.directive_outcome.CopyFrom(
                pb.DirectiveOutcome(
                    directive_id=outcome.directive_id,
                    status=f"DIRECTIVE_STATUS_{outcome.status.name}",
                    reason=outcome.reason,
                )
            )
    return message


def _occupancy(occupancy: Occupancy) -> pb.Occupancy:
    return pb.Occupancy(
        sessions=[_session(session) for session in occupancy.sessions],
        device_used_tokens=occupancy.device_used_tokens,
        host_used_bytes=occupancy.host_used_bytes,
        disk_used_bytes=occupancy.disk_used_bytes,
        running_count=occupancy.running_count,
        waiting_count=occupancy.waiting_count,
        cost=_cost(occupancy.cost),
        totals=_totals(occupancy.totals),
        device_capacity_tokens=occupancy.device_capacity_tokens,
        host_capacity_bytes=occupancy.host_capacity_bytes,
    )


def _session(session: SessionKv) -> pb.SessionKv:
    return pb.SessionKv(
        session_id=session.session_id,
        tenant_id=session.tenant_id,
        phase=SESSION_PHASE_TO_PB[session.phase],
        tier=KV_TIER_TO_PB[session.tier],
        held_tokens=session.held_tokens,
        context_tokens=session.context_tokens,
        host_bytes=session.host_bytes,
        disk_bytes=session.disk_bytes,
        retain_until_ns=session.retain_until_ns or 0,
        shared_tokens=session.shared_tokens,
        charged_tokens=session.charged_tokens,
    )


def _totals(totals: EngineTotals) -> pb.EngineTotals:
    return pb.EngineTotals(
        prefill_tokens=totals.prefill_tokens,
        decode_tokens=totals.decode_tokens,
        cached_tokens=totals.cached_tokens,
        recomputed_tokens=totals.recomputed_tokens,
        swap_out_count=totals.swap_out_count,
        swap_out_bytes=totals.swap_out_bytes,
        swap_out_ns=totals.swap_out_ns,
        swap_in_count=totals.swap_in_count,
        swap_in_bytes=totals.swap_in_bytes,
        swap_in_ns=totals.swap_in_ns,
        preempted_count=totals.preempted_count,
    )


def _cost(cost: CostModel) -> pb.CostModel:
    return pb.CostModel(
        prefill_seconds_per_token=cost.prefill_seconds_per_token,
        prefill_seconds_per_token2=cost.prefill_seconds_per_token2,
        decode_step_seconds=cost.decode_step_seconds,
        decode_seconds_per_sequence=cost.decode_seconds_per_sequence,
        host_bytes_per_second=cost.host_bytes_per_second,
        disk_bytes_per_second=cost.disk_bytes_per_second,
    )
