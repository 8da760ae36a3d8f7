"""Facts as the messages of policy.proto. Owns the translation and nothing else.

Views that are plain copies of a fact are paired with it by name (translation.py); those that are mostly words and sums
are spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...gpuctl.translation import Translation, check_parts
from ...policies.actions import Candidate
from ...policies.correlate import held_bytes
from ...policies.fairness import shares
from ...policies.memory.step import subject
from ...policies.model import MIB, CgroupId, Engine, EngineTotals, ProcessRole, Sandbox, Session, ToolCall
from ...policies.policy import Policy
from ...policies.snapshot import Snapshot
from ...policies.whynot import Look
from ..api.v1 import policy_pb2 as pb
from ..observe.history import History, Told
from . import words

DECISIONS_SHOWN = 20

_SANDBOX = Translation(
    Sandbox,
    pb.SandboxView,
    renamed={"tenant": "tenant_id", "path": "cgroup_path", "session": "session_id"},
    here=("registered_ns", "cpu_ns", "agent_start_ticks", "direct"),
)
_ENGINE = Translation(
    Engine,
    pb.EngineView,
    renamed={"id": "engine_id"},
    here=("pid", "disk_capacity_bytes", "cost", "supported_directives", "listen_addresses", "totals", "observed_ns"),
    there=None,
)
_TOTALS = Translation(EngineTotals, pb.EngineView, there=None)
check_parts(pb.EngineView, (_ENGINE, _TOTALS))
_CANDIDATE = Translation(Candidate, pb.CandidateView)
_LOOK = Translation(Look, pb.LookView)


def watch_response(
    snapshot: Snapshot, policy: Policy, history: History, would_be: Callable[[ToolCall], str] = lambda call: ""
) -> pb.WatchResponse:
    names = {s.cgroup_id: s.name for s in snapshot.sandboxes}
    calls = sorted(snapshot.tool_calls, key=lambda c: c.start_ns, reverse=True)
    return pb.WatchResponse(
        now_ns=snapshot.now_ns,
        host=host_view(snapshot, policy),
        tenants=tenant_views(snapshot, policy),
        sandboxes=[sandbox_view(s) for s in snapshot.sandboxes],
        tool_calls=[tool_call_view(c, names, history, would_be(c)) for c in calls],
        sessions=[session_view(s, snapshot) for s in snapshot.sessions],
        engines=[engine_view(e) for e in snapshot.engines],
        decisions=[decision_view(t) for t in history.newest(DECISIONS_SHOWN)],
        processes=[process_view(p, snapshot) for p in snapshot.processes],
    )


def host_view(snapshot: Snapshot, policy: Policy) -> pb.HostView:
    host = snapshot.host
    return pb.HostView(
        memory_total_bytes=host.memory_total_bytes,
        memory_available_bytes=host.memory_available_bytes,
        psi_some_ratio=host.psi_some_ratio,
        tool_pool_bytes=policy.memory.pool_bytes(host.memory_total_bytes),
        tool_used_bytes=snapshot.tool_used_bytes(),
        gpu_total_bytes=host.gpu_total_bytes,
        gpu_used_bytes=host.gpu_used_bytes,
    )


def tenant_views(snapshot: Snapshot, policy: Policy) -> list[pb.TenantView]:
    return [
        pb.TenantView(
            tenant_id=share.tenant,
            weight=share.weight,
            dominant_share=share.weighted,
            dominant_resource=share.resource,
            memory_bytes=share.memory_bytes,
            kv_device_bytes=share.kv_device_bytes,
            kv_host_bytes=share.kv_host_bytes,
        )
        for share in shares(snapshot, policy).values()
    ]


def sandbox_view(sandbox: Sandbox) -> pb.SandboxView:
    return _SANDBOX.encode(sandbox)


def tool_call_view(call: ToolCall, names: dict[CgroupId, str], history: History, would_be: str = "") -> pb.ToolCallView:
    return pb.ToolCallView(
        tool_call_id=words.tool_call_hex(call.id),
        tenant_id=call.tenant,
        sandbox=names.get(call.sandbox, str(call.sandbox)),
        session_id=call.session,
        command=call.command,
        kind=call.kind,
        source=call.source.value,
        confidence=call.confidence,
        start_ns=call.start_ns,
        end_ns=call.end_ns or 0,
        phase=call.phase.value,
        used_bytes=call.used_bytes,
        peak_bytes=call.peak_bytes,
        hard_bytes=call.hard_bytes,
        overshoot_bytes=call.overshoot_bytes,
        stalled_ns=call.stalled_ns,
        exit_code=call.exit_code,
        signal=call.signal,
        escaped_count=call.escaped_count,
        kv_held_bytes=call.kv.held_bytes,
        kv_idle_byte_seconds=call.kv.idle_byte_seconds,
        verdict=call.verdict.value if call.verdict else "",
        actions=[f"{words.of_decision(t.decision, t.outcome)} ({t.decision.rule})" for t in history.about(call)],
        kv_at_peak_bytes=call.kv.at_peak_bytes,
        peak_ns=call.peak_ns,
        pid=call.pid or 0,
        agent_call_id=call.call_id or "",
        exempt=call.exempt,
        facts=[fact.words for fact in call.facts],
        would_be=would_be,
    )


def process_view(process: ProcessRole, snapshot: Snapshot) -> pb.ProcessView:
    sandbox = next((s for s in snapshot.sandboxes if s.cgroup_id == process.sandbox), None)
    return pb.ProcessView(
        tenant_id=sandbox.tenant if sandbox else "",
        sandbox=sandbox.name if sandbox else str(process.sandbox),
        pid=process.pid,
        command=process.command,
        role=process.role.value,
        confidence=process.confidence,
        why=process.why,
        since_ns=process.since_ns,
    )


def session_view(session: Session, snapshot: Snapshot) -> pb.SessionView:
    engine = snapshot.engine(session.engine)
    sandbox = next((s.label for s in snapshot.sandboxes if s.cgroup_id == session.sandbox), "")
    return pb.SessionView(
        session_id=session.id,
        tenant_id=session.tenant,
        engine_id=session.engine,
        phase=session.phase.value,
        tier=session.tier.value,
        held_tokens=session.held_tokens,
        context_tokens=session.context_tokens,
        held_bytes=held_bytes(session, engine) if engine else 0,
        host_bytes=session.host_bytes,
        verdict=session.verdict.value if session.verdict else "",
        in_tool_call=snapshot.running_call_of(session.id) is not None,
        ended_turn_count=session.cost.turn_count,
        pte=session.cost.pte,
        wasted_pte=session.cost.wasted_pte,
        energy_joules=session.cost.energy_joules,
        slowdown_ratio=session.cost.slowdown_ratio,
        sandbox=sandbox,
    )


def call_words(call: ToolCall, snapshot: Snapshot) -> str:
    """ "gold/ada pytest, running, 120 MiB of 512 MiB"."""
    budget = f" of {call.hard_bytes / MIB:.0f} MiB" if call.hard_bytes else ", no budget"
    return f"{subject(call, snapshot.sandboxes)}, {call.phase.value}, peak {call.peak_bytes / MIB:.0f} MiB{budget}"


def why_not_response(subject: str, looks: Iterable[Look]) -> pb.WhyNotResponse:
    return pb.WhyNotResponse(subject=subject, looks=[_LOOK.encode(look) for look in looks])


def engine_view(engine: Engine) -> pb.EngineView:
    view = _ENGINE.encode(engine)
    view.MergeFrom(_TOTALS.encode(engine.totals))
    return view


def decision_view(told: Told, unix_offset_ns: int = 0) -> pb.DecisionView:
    """`unix_offset_ns`: between the clock of its boot and that on the wall."""
    decision, outcome = told.decision, told.outcome
    latency_ns = outcome.latency_ns if outcome else None
    return pb.DecisionView(
        decision_id=decision.id,
        at_ns=decision.at_ns,
        rule=decision.rule,
        tenant_id=decision.tenant,
        subject=decision.subject,
        evidence=decision.evidence,
        action=words.of_action(decision.action),
        outcome=outcome.status.value if outcome else "",
        tier=outcome.tier if outcome else "",
        detail=outcome.detail if outcome else "",
        latency_ms=latency_ns / 1e6 if latency_ns is not None else None,
        tool_call_id=words.tool_call_hex(told.tool_call) if told.tool_call is not None else "",
        session_id=told.session or "",
        candidates=[_CANDIDATE.encode(c) for c in decision.candidates],
        measurement=decision.measurement,
        threshold=decision.threshold,
        unit=decision.unit,
        expires_ns=getattr(decision.action, "expires_ns", None),
        at_unix_ns=decision.at_ns + unix_offset_ns,
    )
