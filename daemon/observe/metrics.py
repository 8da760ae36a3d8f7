"""The Prometheus endpoint: `equipoise_*`, in base units.

Owns the names of the metrics and the HTTP server. Gauges come from the snapshot, counters from `tallies`. Tenants, tool
kinds, rules and tiers are labels; sessions, sandboxes, tool calls and engines by their ids never are, since their
number has no bound.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from ...policies.correlate import device_bytes
from ...policies.model import NS_PER_S, KvTier, ToolCallPhase
from ...policies.snapshot import Snapshot
from ..errors import ListenError
from .tallies import OTHER, TENANTS, Counts


@dataclass(frozen=True, slots=True)
class MetricsFacts:
    """Everything that one scrape shows."""

    snapshot: Snapshot
    counts: Counts
    version: str = ""
    policy: str = ""
    mode: str = ""
    policy_refused: bool = False
    """Its files, as they are now, are not in force."""
    ring_drop_count: int = 0
    unrecorded_call_count: int = 0
    late_event_count: int = 0
    failed_action_count: int = 0
    source_failure_count: int = 0
    journal_lost_rows_count: int = 0


def _policy(facts: MetricsFacts) -> Iterator[Metric]:
    named = {"name": facts.policy, "mode": facts.mode}
    yield InfoMetricFamily("equipoise_policy", "The policy in force.", value=named)
    help_text = "1 where the policy's files, as they are now, are refused, and the one before them is in force."
    yield GaugeMetricFamily("equipoise_policy_refused", help_text, value=float(facts.policy_refused))


class MetricsCollector(Collector):
    """Asks for the facts at each scrape, in the server's thread."""

    def __init__(self, facts: Callable[[], MetricsFacts]) -> None:
        self._facts = facts

    def describe(self) -> list[Metric]:
        """Nothing: otherwise registering would collect before there is a snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        facts = self._facts()
        yield InfoMetricFamily("equipoise_build", "Version of the daemon.", value={"version": facts.version})
        yield from _policy(facts)
        yield from _host(facts.snapshot)
        yield from _tenants(facts.snapshot)
        yield from _engines(facts.snapshot)
        yield from _counts(facts.counts)
        for name, help_text, value in (
            ("ring_drops", "Kernel events lost to a full ring buffer.", facts.ring_drop_count),
            ("late_events", "Events about something not, or no longer, known.", facts.late_event_count),
            ("failed_actions", "Actions that the kernel or an engine refused.", facts.failed_action_count),
            ("source_failures", "Failures of samplers, each retried.", facts.source_failure_count),
            ("journal_lost_rows", "Journal rows given up on because the disk refused.", facts.journal_lost_rows_count),
        ):
            yield CounterMetricFamily(f"equipoise_{name}", help_text, value=value)
        yield GaugeMetricFamily(
            "equipoise_tool_calls_without_record",
            "Tool calls that run unknown and without a budget, since all records of the probes are in use.",
            value=facts.unrecorded_call_count,
        )


class MetricsServer:
    """Serves `/metrics` from a thread of its own."""

    def __init__(self, server: WSGIServer, thread: threading.Thread, url: str) -> None:
        self._server = server
        self._thread = thread
        self.url = url

    @classmethod
    def start(cls, listen: str, facts: Callable[[], MetricsFacts]) -> MetricsServer:
        """`listen` is HOST:PORT, [IPV6]:PORT or :PORT (loopback); port 0 takes a free one. Raises ListenError."""
        host, port = _address(listen)
        registry = CollectorRegistry()
        registry.register(MetricsCollector(facts))
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = "another program listens there: give --metrics-listen another port"
            elif error.errno == errno.EACCES:
                remedy = "ports below 1024 need root: give --metrics-listen a higher one"
            else:
                remedy = "give --metrics-listen an address of this machine"
            raise ListenError(f"{listen}: {error.strerror or error}: {remedy}") from error
        shown = f"[{host}]" if ":" in host else host
        return cls(server, thread, f"http://{shown}:{server.server_port}/metrics")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ListenError(f"{listen!r}: not an address: write it as 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    host = snapshot.host
    memory = GaugeMetricFamily("equipoise_host_memory_bytes", "Memory of the machine.", labels=["state"])
    memory.add_metric(["total"], host.memory_total_bytes)
    memory.add_metric(["available"], host.memory_available_bytes)
    yield memory
    pressure = GaugeMetricFamily(
        "equipoise_host_memory_pressure_ratio",
        "Share of the last 10 s in which some, or all, tasks waited for memory (PSI).",
        labels=["kind"],
    )
    for kind, ratio in (("some", host.psi_some_ratio), ("full", host.psi_full_ratio)):
        if ratio is not None:
            pressure.add_metric([kind], ratio)
    yield pressure
    gpu = GaugeMetricFamily("equipoise_gpu_memory_bytes", "Memory of the GPUs, where there are any.", labels=["state"])
    for state, value in (("total", host.gpu_total_bytes), ("used", host.gpu_used_bytes)):
        if value is not None:
            gpu.add_metric([state], value)
    yield gpu


def _tenants(snapshot: Snapshot) -> Iterator[Metric]:
    """Zeroes for every tenant of the policy, so that a series does not vanish when a tenant falls idle."""
    tenants = _Tenants(snapshot)
    weights = GaugeMetricFamily("equipoise_tenant_weight", "Weight under contention.", labels=["tenant"])
    for tenant in snapshot.tenants[:TENANTS]:
        weights.add_metric([tenant.id], tenant.weight)
    yield weights
    sandboxes, memory = tenants.zeroes(), tenants.zeroes()
    for sandbox in snapshot.sandboxes:
        sandboxes[tenants.label(sandbox.tenant)] += 1
        memory[tenants.label(sandbox.tenant)] += sandbox.memory_bytes
    yield _gauge("equipoise_sandboxes", "Registered sandboxes.", "tenant", sandboxes)
    yield _gauge("equipoise_sandbox_memory_bytes", "Charged to sandboxes, page cache included.", "tenant", memory)
    tool_memory = tenants.zeroes()
    calls: Counter[tuple[str, str]] = Counter()
    for tenant_label in tool_memory:
        for phase in ToolCallPhase:
            if phase is not ToolCallPhase.ENDED:
                calls[tenant_label, phase.value] = 0
    for call in snapshot.tool_calls:
        if call.gone_ns is None:
            tool_memory[tenants.label(call.tenant)] += call.used_bytes
        if call.running:
            calls[tenants.label(call.tenant), call.phase.value] += 1
    yield _gauge("equipoise_tool_memory_bytes", "Used by tool calls, escapees included.", "tenant", tool_memory)
    running = GaugeMetricFamily("equipoise_tool_calls_running", "Tool calls by phase.", labels=["tenant", "phase"])
    for key, count in calls.items():
        running.add_metric(key, count)
    yield running
    held: Counter[tuple[str, str]] = Counter()
    for session in snapshot.sessions:
        engine = snapshot.engine(session.engine)
        label = tenants.label(session.tenant)
        held[label, KvTier.DEVICE.value] += device_bytes(session, engine) if engine is not None else 0
        held[label, KvTier.HOST.value] += session.host_bytes
        held[label, KvTier.DISK.value] += session.disk_bytes
    kv = GaugeMetricFamily("equipoise_kv_bytes", "KV cache held for sessions, by tier.", labels=["tenant", "tier"])
    for key, value in held.items():
        kv.add_metric(key, value)
    yield kv


def _engines(snapshot: Snapshot) -> Iterator[Metric]:
    """By kind of engine and model: two engines of one kind are added up."""
    labels = ["engine", "model"]
    attached = GaugeMetricFamily("equipoise_engines_attached", "Engines attached now.", labels=labels)
    device = GaugeMetricFamily("equipoise_engine_kv_tokens", "KV slots on the device.", labels=[*labels, "state"])
    tokens = CounterMetricFamily("equipoise_engine_tokens", "Tokens by what was done.", labels=[*labels, "work"])
    swaps = CounterMetricFamily("equipoise_engine_swaps", "Sessions moved.", labels=[*labels, "direction"])
    moved = CounterMetricFamily("equipoise_engine_swap_bytes", "Bytes moved.", labels=[*labels, "direction"])
    took = CounterMetricFamily("equipoise_engine_swap_seconds", "Time spent moving.", labels=[*labels, "direction"])
    preempted = CounterMetricFamily("equipoise_engine_preempted", "Turns preempted.", labels=labels)
    groups: dict[tuple[str, str], Counter[str]] = {}
    for engine in snapshot.engines:
        sums = groups.setdefault((engine.kind, engine.model), Counter())
        sums["attached"] += int(engine.attached)
        sums["used"] += engine.device_used_tokens if engine.attached else 0
        sums["capacity"] += engine.device_capacity_tokens if engine.attached else 0
        totals = engine.totals
        sums["prefill"] += totals.prefill_tokens
        sums["decode"] += totals.decode_tokens
        sums["cached"] += totals.cached_tokens
        sums["recomputed"] += totals.recomputed_tokens
        sums["preempted"] += totals.preempted_count
        for way, count, size, time_ns in (
            ("out", totals.swap_out_count, totals.swap_out_bytes, totals.swap_out_ns),
            ("in", totals.swap_in_count, totals.swap_in_bytes, totals.swap_in_ns),
        ):
            sums[f"count_{way}"] += count
            sums[f"bytes_{way}"] += size
            sums[f"ns_{way}"] += time_ns
    for key, sums in groups.items():
        attached.add_metric(key, sums["attached"])
        preempted.add_metric(key, sums["preempted"])
        for state in ("used", "capacity"):
            device.add_metric([*key, state], sums[state])
        for work in ("prefill", "decode", "cached", "recomputed"):
            tokens.add_metric([*key, work], sums[work])
        for way in ("out", "in"):
            swaps.add_metric([*key, way], sums[f"count_{way}"])
            moved.add_metric([*key, way], sums[f"bytes_{way}"])
            took.add_metric([*key, way], sums[f"ns_{way}"] / NS_PER_S)
    yield from (attached, device, tokens, swaps, moved, took, preempted)


def _counts(counts: Counts) -> Iterator[Metric]:
    ended = CounterMetricFamily(
        "equipoise_tool_calls",
        "Tool calls that ended, by program and how they were found.",
        labels=["kind", "source"],
    )
    for kind_and_source, count in counts.tool_calls.items():
        ended.add_metric(kind_and_source, count)
    yield ended
    duration = SummaryMetricFamily(
        "equipoise_tool_call_duration_seconds", "Duration of tool calls that ended.", labels=["tenant"]
    )
    for tenant, count in counts.tool_calls_ended.items():
        duration.add_metric([tenant], count, counts.tool_call_seconds[tenant] / 1000)
    yield duration
    actions = CounterMetricFamily(
        "equipoise_actions", "Actions by kind and what came of them.", labels=["action", "tenant", "status"]
    )
    for action_key, count in counts.actions.items():
        actions.add_metric(action_key, count)
    yield actions
    for name, help_text, label, by_label in (
        ("budget_stops", "Tool calls stopped at their hard budget.", "tenant", counts.budget_stops),
        ("decisions", "Decisions by rule.", "rule", counts.decisions),
        ("outcomes", "Outcomes of decisions by status.", "status", counts.outcomes),
        ("events_lost", "Events that will never come, by source.", "source", counts.events_lost),
    ):
        family = CounterMetricFamily(f"equipoise_{name}", help_text, labels=[label])
        for value, count in by_label.items():
            family.add_metric([value], count)
        yield family


def _gauge(name: str, help_text: str, label: str, values: Counter[str]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


class _Tenants:
    """The tenants that may be labels: those of the policy, at most 64; any other is `other`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._known = [str(t.id) for t in snapshot.tenants[:TENANTS]]

    def label(self, tenant: str) -> str:
        return tenant if tenant in self._known else OTHER

    def zeroes(self) -> Counter[str]:
        return Counter(dict.fromkeys(self._known, 0))
