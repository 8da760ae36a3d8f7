"""The demo's report: what every tool call cost, what was decided, and how fairly, as values and as JSON.

Owns the shape of `report.json` and how its figures are derived. Every figure comes from the daemon's answers or from
the agents' own logs. Must not: print (tables.py) or draw (timeline.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..api.v1 import policy_pb2
from .record import Sample
from .scenario import Agent

_OUTPUT_PRICE = 2
"""Service of an output token in prompt tokens, as VTC counts it (p_in : p_out = 1 : 2)."""


@dataclass(frozen=True, slots=True)
class ReportedToolCall:
    """One tool call: its memory, the KV its session held meanwhile, and what was done to it."""

    id: str
    tenant: str
    sandbox: str
    session: str
    command: str
    kind: str
    source: str
    confidence: float
    pid: int
    start_ns: int
    end_ns: int | None
    """None: it still ran when the report was made."""
    phase: str
    exit_code: int | None
    signal: int | None
    escaped_count: int
    peak_bytes: int
    peak_ns: int
    hard_bytes: int
    overshoot_bytes: int | None
    """Most by which it stood above its hard budget when the kernel stopped it; None: never stopped."""
    stalled_ns: int
    kv_held_bytes: int
    kv_at_peak_bytes: int
    kv_idle_byte_seconds: float
    verdict: str
    actions: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.sandbox}"


@dataclass(frozen=True, slots=True)
class ReportedEngine:
    kind: str
    model: str
    bytes_per_token: int
    device_capacity_tokens: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    swap_out_count: int
    swap_out_bytes: int
    swap_out_ms: float
    swap_in_count: int
    swap_in_bytes: int
    swap_in_ms: float
    preempted_count: int


@dataclass(frozen=True, slots=True)
class ReportedDecision:
    id: str
    at_ns: int
    rule: str
    tenant: str
    subject: str
    evidence: str
    action: str
    outcome: str
    tier: str
    detail: str
    latency_ms: float | None
    tool_call: str
    session: str


@dataclass(frozen=True, slots=True)
class Losses:
    ring_drops: int
    late_events: int
    failed_actions: int


@dataclass(frozen=True, slots=True)
class TenantFairness:
    """How a tenant fared. Shares are weighted: under contention equal ones are fair."""

    tenant: str
    weight: float
    dominant_share_mean: float
    """Over the samples in which the tenant had anything."""
    dominant_share_max: float
    dominant_resource: str
    """That of most of these samples."""
    service_tokens: int
    """Prompt tokens computed plus twice the output tokens, as VTC counts service."""
    service_per_weight: float
    ttft_mean_seconds: float | None
    stalled_seconds: float
    """Time its tool calls were stopped, frozen or throttled."""
    killed_count: int


@dataclass(frozen=True, slots=True)
class AgentReport:
    tenant: str
    name: str
    plan: str
    exit_code: int | None
    """None: it had to be ended."""
    ended: str
    """"plan done", "deadline" or the error."""
    turn_count: int
    tool_count: int
    killed_count: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_mean_seconds: float | None
    notices: tuple[str, ...]
    """What it was told about its tool calls, in the order it heard it."""
    last_answer: str

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    probe_backend: str
    cgroup_layout: str
    policy: str
    lacks: tuple[str, ...]
    start_ns: int
    end_ns: int
    tool_calls: tuple[ReportedToolCall, ...]
    engine: ReportedEngine | None
    decisions: tuple[ReportedDecision, ...]
    losses: Losses
    fairness: tuple[TenantFairness, ...]
    agents: tuple[AgentReport, ...]

    @property
    def correlated(self) -> tuple[ReportedToolCall, ...]:
        """The tool calls during which their session is known to have held KV."""
        return tuple(call for call in self.tool_calls if call.kv_held_bytes > 0)

    def complaints(self) -> tuple[str, ...]:
        """Why the demo did not show what it is for; empty where it did."""
        found = [f"agent {a.label}: {a.ended} (exit code {a.exit_code})" for a in self.agents if a.exit_code != 0]
        if not self.tool_calls:
            found.append("no tool call was seen")
        elif not self.correlated:
            found.append("no tool call was correlated with KV")
        return tuple(found)


def build(
    *,
    status: policy_pb2.GetStatusResponse,
    calls: Sequence[policy_pb2.ToolCallView],
    decisions: Sequence[policy_pb2.DecisionView],
    engines: Sequence[policy_pb2.EngineView],
    samples: Sequence[Sample],
    agents: Sequence[AgentReport],
) -> Report:
    """Put the report together from the daemon's last answers, the samples taken on the way and the agents' logs."""
    # A sandbox that is gone has no name any more, only its cgroup id; the samples remember.
    names = {str(s.cgroup_id): s.name for sample in samples for s in sample.sandboxes}
    reported = tuple(
        _tool_call(call, names.get(call.sandbox, call.sandbox)) for call in sorted(calls, key=lambda c: c.start_ns)
    )
    return Report(
        version=status.version,
        probe_backend=status.probe_backend,
        cgroup_layout=status.cgroup_layout,
        policy=status.policy_name,
        lacks=tuple(status.lacks),
        start_ns=samples[0].at_ns if samples else 0,
        end_ns=samples[-1].at_ns if samples else 0,
        tool_calls=reported,
        engine=_engine(engines[0]) if engines else None,
        decisions=tuple(_decision(decision) for decision in sorted(decisions, key=lambda d: d.at_ns)),
        losses=Losses(status.ring_drop_count, status.late_event_count, status.failed_action_count),
        fairness=_fairness(samples, reported, agents),
        agents=tuple(agents),
    )


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def read_agent(agent: Agent, log: Path, exit_code: int | None) -> AgentReport:
    """Sum up an agent's JSON lines. A log that is missing or ends early is a report that says so."""
    turns: list[dict[str, object]] = []
    tools: list[dict[str, object]] = []
    ended = "ended before its plan was done"
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of an agent that was killed while it wrote
        match entry.get("kind"):
            case "turn":
                turns.append(entry)
            case "tool":
                tools.append(entry)
            case "end":
                ended = str(entry.get("reason"))
    refused = [str(t["command"]) for t in tools if not t.get("accepted")]
    if refused and exit_code:
        ended = f"unexpected exit of `{refused[0]}`"
    return AgentReport(
        tenant=agent.tenant,
        name=agent.name,
        plan=agent.plan.name,
        exit_code=exit_code,
        ended=ended,
        turn_count=len(turns),
        tool_count=len(tools),
        killed_count=sum(t.get("signal") is not None for t in tools),
        prompt_tokens=_total(turns, "prompt_tokens"),
        cached_tokens=_total(turns, "cached_tokens"),
        output_tokens=_total(turns, "output_tokens"),
        ttft_mean_seconds=_mean([float(str(t["ttft_seconds"])) for t in turns]),
        notices=tuple(str(t["notice"]) for t in tools if t.get("notice")),
        last_answer=str(turns[-1]["answer"]).strip() if turns else "",
    )


def _total(entries: Sequence[dict[str, object]], key: str) -> int:
    return sum(value for entry in entries if isinstance(value := entry.get(key), int))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tool_call(view: policy_pb2.ToolCallView, sandbox: str) -> ReportedToolCall:
    return ReportedToolCall(
        id=view.tool_call_id,
        tenant=view.tenant_id,
        sandbox=sandbox,
        session=view.session_id,
        command=view.command,
        kind=view.kind,
        source=view.source,
        confidence=view.confidence,
        pid=view.pid,
        start_ns=view.start_ns,
        end_ns=view.end_ns or None,
        phase=view.phase,
        exit_code=view.exit_code if view.HasField("exit_code") else None,
        signal=view.signal if view.HasField("signal") else None,
        escaped_count=view.escaped_count,
        peak_bytes=view.peak_bytes,
        peak_ns=view.peak_ns,
        hard_bytes=view.hard_bytes,
        overshoot_bytes=view.overshoot_bytes if view.HasField("overshoot_bytes") else None,
        stalled_ns=view.stalled_ns,
        kv_held_bytes=view.kv_held_bytes,
        kv_at_peak_bytes=view.kv_at_peak_bytes,
        kv_idle_byte_seconds=view.kv_idle_byte_seconds,
        verdict=view.verdict,
        actions=tuple(view.actions),
    )


def _engine(view: policy_pb2.EngineView) -> ReportedEngine:
    return ReportedEngine(
        kind=view.kind,
        model=view.model,
        bytes_per_token=view.bytes_per_token,
        device_capacity_tokens=view.device_capacity_tokens,
        prefill_tokens=view.prefill_tokens,
        decode_tokens=view.decode_tokens,
        cached_tokens=view.cached_tokens,
        recomputed_tokens=view.recomputed_tokens,
        swap_out_count=view.swap_out_count,
        swap_out_bytes=view.swap_out_bytes,
        swap_out_ms=view.swap_out_ns / 1e6,
        swap_in_count=view.swap_in_count,
        swap_in_bytes=view.swap_in_bytes,
        swap_in_ms=view.swap_in_ns / 1e6,
        preempted_count=view.preempted_count,
    )


def _decision(view: policy_pb2.DecisionView) -> ReportedDecision:
    return ReportedDecision(
        id=view.decision_id,
        at_ns=view.at_ns,
        rule=view.rule,
        tenant=view.tenant_id,
        subject=view.subject,
        evidence=view.evidence,
        action=view.action,
        outcome=view.outcome,
        tier=view.tier,
        detail=view.detail,
        latency_ms=view.latency_ms if view.HasField("latency_ms") else None,
        tool_call=view.tool_call_id,
        session=view.session_id,
    )


def _fairness(
    samples: Sequence[Sample], calls: Sequence[ReportedToolCall], agents: Sequence[AgentReport]
) -> tuple[TenantFairness, ...]:
    weights = {t.tenant: t.weight for sample in samples for t in sample.tenants}
    rows = []
    for tenant, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
        seen = [t for sample in samples for t in sample.tenants if t.tenant == tenant and t.dominant_share > 0]
        resources = [t.dominant_resource for t in seen]
        theirs = [a for a in agents if a.tenant == tenant]
        service = sum(a.prompt_tokens - a.cached_tokens + _OUTPUT_PRICE * a.output_tokens for a in theirs)
        waits = [a.ttft_mean_seconds for a in theirs if a.ttft_mean_seconds is not None]
        rows.append(
            TenantFairness(
                tenant=tenant,
                weight=weight,
                dominant_share_mean=_mean([t.dominant_share for t in seen]) or 0.0,
                dominant_share_max=max((t.dominant_share for t in seen), default=0.0),
                dominant_resource=max(set(resources), key=resources.count) if resources else "",
                service_tokens=service,
                service_per_weight=service / weight,
                ttft_mean_seconds=_mean(waits),
                stalled_seconds=sum(c.stalled_ns for c in calls if c.tenant == tenant) / 1e9,
                killed_count=sum(a.killed_count for a in theirs),
            )
        )
    return tuple(rows)
