"""One tenant floods, two trickle: what the trickle waits, against running alone; and how far service drifts apart.

The picture build/bench/engine-fairness.png shows weighted service per tenant over time.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.cost import fit
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Slo, TenantId, TurnEvent, TurnFinished, TurnRequest
from equipoise.tests.bench.report import OUT, Baseline, Row

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 16
KV_TOKENS = 4096
SECONDS = 24.0
PERIOD_S = 3.0


@dataclass
class Curve:
    """Service counters sampled over time."""

    at_s: list[float] = field(default_factory=list)
    service: list[dict[TenantId, float]] = field(default_factory=list)


class _Clients:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0

    def ask(self, tenant: str, *, urgent: bool) -> queue.SimpleQueue[TurnEvent]:
        self._count += 1
        events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        self._engine.submit(
            TurnRequest(
                SessionId(f"{tenant}-{self._count}"),
                TenantId(tenant),
                f"{self._count}:" + " the" * PROMPT_TOKENS,
                max_tokens=OUTPUT_TOKENS,
                ephemeral=True,
                ignore_end_of_text=True,
                slo=Slo(ttft_ns=400_000_000) if urgent else Slo(),
            ),
            events.put,
        )
        return events

    def trickle(self, tenants: tuple[str, ...], seconds: float) -> list[float]:
        """One turn of each tenant every period; the times to first token, seconds."""
        asked = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for tenant in tenants:
                asked.append(self.ask(tenant, urgent=True))
                time.sleep(PERIOD_S / len(tenants))
        return [(_end(events).ttft_ns or 0) / 1e9 for events in asked]

    def flood(self, tenant: str, width: int, stop: threading.Event) -> None:
        """Keep `width` turns of the tenant in the queue until told to stop."""
        waiting = [self.ask(tenant, urgent=False) for _ in range(width)]
        while not stop.is_set():
            for index, events in enumerate(waiting):
                if _ended(events):
                    waiting[index] = self.ask(tenant, urgent=False)
            time.sleep(0.005)
        for events in waiting:
            _end(events)


def rows(model: LanguageModel) -> list[Row]:
    runner = LlamaRunner(model, kv_tokens=KV_TOKENS, slot_count=32, mode=ContextMode.UNIFIED, threads=1)
    engine = Engine(model, runner, EngineConfig(kv_tokens=KV_TOKENS, scheduler=SchedulerConfig(max_running=8)))
    engine.cost = fit(runner)
    engine.start()
    clients = _Clients(engine)
    try:
        tenants = ("amber", "blue")
        clients.trickle(tenants, 2.0)
        alone = clients.trickle(tenants, SECONDS)
        stop = threading.Event()
        flood = threading.Thread(target=clients.flood, args=("flood", 24, stop))
        flood.start()
        time.sleep(2.0)
        beside = clients.trickle(tenants, SECONDS)
        stop.set()
        flood.join()
        curve = _all_backlogged(engine, clients, ("amber", "blue", "flood"))
    finally:
        engine.stop()
        runner.close()
    bound = 2 * max(PROMPT_TOKENS, 2 * KV_TOKENS)
    gap = max(max(point.values()) - min(point.values()) for point in curve.service)
    _draw(curve)
    return [
        Row(
            "trickle's p99 time to first token beside a flood, ratio to alone",
            _quantile(beside, 0.99) / _quantile(alone, 0.99),
            "",
            1.5,
            "lower",
            Baseline("alone, p99 s", _quantile(alone, 0.99)),
            [round(value, 4) for value in beside],
            f"p50 {_quantile(beside, 0.5):.3f} s against {_quantile(alone, 0.5):.3f} s; the flood queues 24 turns",
        ),
        Row(
            "service gap of backlogged tenants",
            gap,
            "units",
            float(bound),
            "lower",
            Baseline("VTC's bound 2 max(w_p L, w_q M)", float(bound)),
            [round(max(p.values()) - min(p.values()), 1) for p in curve.service[:: max(1, len(curve.service) // 20)]],
            f"largest over {len(curve.service)} samples; picture in engine-fairness.png",
        ),
    ]


def _all_backlogged(engine: Engine, clients: _Clients, tenants: tuple[str, ...]) -> Curve:
    """All tenants flood at once, unequally wide; counters from when the last has joined."""
    stop, curve, widths = threading.Event(), Curve(), (6, 10, 24)
    threads = [
        threading.Thread(target=clients.flood, args=(tenant, width, stop))
        for tenant, width in zip(tenants, widths, strict=True)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        counters = engine.books_now()[1]
        curve.at_s.append(time.monotonic() - began)
        curve.service.append({TenantId(tenant): counters.get(TenantId(tenant), 0.0) for tenant in tenants})
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    return curve


def _draw(curve: Curve) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True)
    floor = {tenant: curve.service[0][tenant] for tenant in curve.service[0]}
    for tenant, start in floor.items():
        top.plot(curve.at_s, [point[tenant] - start for point in curve.service], label=tenant)
    bottom.plot(curve.at_s, [max(p.values()) - min(p.values()) for p in curve.service], color="black")
    top.set_ylabel("service units")
    top.legend()
    bottom.set_ylabel("largest gap")
    bottom.set_xlabel("seconds")
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "engine-fairness.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _ended(events: queue.SimpleQueue[TurnEvent]) -> bool:
    while not events.empty():
        if isinstance(events.get(), TurnFinished):
            return True
    return False


def _end(events: queue.SimpleQueue[TurnEvent]) -> TurnFinished:
    while not isinstance(event := events.get(timeout=300), TurnFinished):
        pass
    return event


def _quantile(values: list[float], ratio: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(ratio * len(ordered)))]
