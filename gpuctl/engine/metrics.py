"""The engine's own Prometheus page: `equipoise_engine_*`, base units, no session ids as labels.

Owns: the mapping from the books to metric families. Must not: count anything itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from ...policies.model import KvTier
from ..reports import Occupancy
from .schedule.sequence import TenantId
from .turn_cost import AccountsNow

_PREFIX = "equipoise_engine_"


class _Page(Collector):
    def __init__(self, occupancy: Occupancy, service: Mapping[TenantId, float], accounts: AccountsNow) -> None:
        self._occupancy = occupancy
        self._service = service
        self._accounts = accounts

    def collect(self) -> Iterable[Metric]:
        now, totals = self._occupancy, self._accounts.totals
        counters: dict[str, tuple[float, str]] = {
            "prefill_tokens": (totals.prefill_tokens, "Prompt tokens computed."),
            "decode_tokens": (totals.decode_tokens, "Output tokens sampled."),
            "cached_tokens": (totals.cached_tokens, "Prompt tokens served from KV that was kept."),
            "recomputed_tokens": (totals.recomputed_tokens, "Tokens computed again because their KV had been dropped."),
            "shared_tokens": (totals.shared_tokens, "Prompt tokens found in another session's cells."),
            "swap_out_bytes": (totals.swap_out_bytes, "KV bytes copied from the device."),
            "swap_in_bytes": (totals.swap_in_bytes, "KV bytes copied to the device."),
            "swap_failures": (totals.swap_failures, "Copies of KV that could not be used."),
            "preempted_turns": (totals.preempted_count, "Turns taken out of the batch."),
            "interrupted_steps": (totals.interrupted_steps, "Steps cut short for an urgent turn."),
            "turns": (totals.turns_finished, "Turns ended, for whatever reason."),
            "steps": (totals.steps, "Batches computed."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=value)
        seconds = CounterMetricFamily(_PREFIX + "swap_seconds", "Time spent copying KV.", labels=["direction"])
        seconds.add_metric(["out"], totals.swap_out_ns / 1e9)
        seconds.add_metric(["in"], totals.swap_in_ns / 1e9)
        yield seconds
        held = GaugeMetricFamily(_PREFIX + "kv_tokens", "Tokens whose KV is held.", labels=["tenant", "tier"])
        sums: dict[tuple[str, str], int] = {}
        for session in now.sessions:
            if session.tier is not KvTier.NONE:
                key = (session.tenant_id, session.tier.value)
                sums[key] = sums.get(key, 0) + session.held_tokens
        for (tenant, tier), tokens in sorted(sums.items()):
            held.add_metric([tenant, tier], tokens)
        yield held
        used = GaugeMetricFamily(_PREFIX + "tier_used_bytes", "KV in a tier below the device.", labels=["tier"])
        room = GaugeMetricFamily(_PREFIX + "tier_capacity_bytes", "KV that it may hold.", labels=["tier"])
        for lower in now.tiers:
            used.add_metric([lower.tier], lower.used_bytes)
            room.add_metric([lower.tier], lower.capacity_bytes)
        yield from (used, room)
        service = CounterMetricFamily(
            _PREFIX + "service_units", "Weighted token service (VTC): input 1, output 2.", labels=["tenant"]
        )
        for tenant_id, units in sorted(self._service.items()):
            service.add_metric([tenant_id], units)
        yield service
        yield from _costs(self._accounts)
        gauges: dict[str, tuple[float, str]] = {
            "device_used_tokens": (now.device_used_tokens, "Tokens held on the device."),
            "device_capacity_tokens": (now.device_capacity_tokens, "Tokens the device may hold."),
            "host_used_bytes": (now.host_used_bytes, "Host RAM that holds KV."),
            "host_capacity_bytes": (now.host_capacity_bytes, "Host RAM that may hold KV."),
            "disk_used_bytes": (now.disk_used_bytes, "Disk that holds KV."),
            "running_turns": (now.running_count, "Turns in the batch."),
            "waiting_turns": (now.waiting_count, "Turns waiting for admission."),
        }
        for name, (amount, text) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=amount)


def _costs(accounts: AccountsNow) -> Iterable[Metric]:
    """Of turns that have ended. Without energy counters there is no energy series; the info says so in words."""
    gamma = accounts.gamma
    yield InfoMetricFamily(
        _PREFIX + "accounting",
        "Where gamma comes from, and what counts energy.",
        value={
            "gamma": "not measured" if gamma is None else gamma.source.value,
            "energy": "+".join(accounts.energy_counters) or "not measured",
        },
    )
    if gamma is not None:
        text = "What a token of context adds to a decode step, in prefill tokens."
        yield GaugeMetricFamily(_PREFIX + "gamma_ratio", text, value=gamma.prefill_tokens)
    pte = CounterMetricFamily(
        _PREFIX + "prefill_token_equivalents", "Work of turns, in prefill tokens (PTE).", labels=["tenant"]
    )
    wasted = CounterMetricFamily(
        _PREFIX + "wasted_prefill_token_equivalents", "Of it, what dropped KV cost again.", labels=["tenant"]
    )
    energy = CounterMetricFamily(
        _PREFIX + "energy_joules", "What the device used while turns were computed.", labels=["tenant"]
    )
    for tenant_id, cost in sorted(accounts.tenants.items()):
        if gamma is not None:
            pte.add_metric([tenant_id], cost.pte)
        wasted.add_metric([tenant_id], cost.wasted_pte)
        if cost.energy_joules is not None:
            energy.add_metric([tenant_id], cost.energy_joules)
    yield from (pte, wasted, energy)


def page(occupancy: Occupancy, service: Mapping[TenantId, float], accounts: AccountsNow) -> bytes:
    """The text exposition of one moment."""
    registry = CollectorRegistry()
    registry.register(_Page(occupancy, service, accounts))
    return generate_latest(registry)
