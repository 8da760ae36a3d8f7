"""An urgent turn during a 4,000-token prefill: its wait with and without the interrupt, and what the prefill loses."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from statistics import median

from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Slo, TenantId, TurnEvent, TurnFinished, TurnRequest
from equipoise.tests.bench.report import Baseline, Row

PROMPT_TOKENS = 4000
ROUNDS = 3


def rows(model: LanguageModel) -> list[Row]:
    without = _waits_without(model)
    engine, runner = _engine(model, interrupts=True)
    waits, lost, calm = [], [], []
    for number in range(ROUNDS):  # by turns, so that what disturbs the machine disturbs both alike
        calm.append(_race(engine, f"calm{number}", None).tokens_per_cpu_s)
        disturbed = _race(engine, f"disturbed{number}", number)
        waits.append(disturbed.wait_s)
        lost.append(1 - disturbed.tokens_per_cpu_s / calm[-1])
    engine.stop()
    runner.close()
    return [
        Row(
            "wait of an urgent turn, ratio to no interrupt",
            median(waits) / median(without),
            "",
            0.1,
            "lower",
            Baseline("without the interrupt, s", median(without)),
            [round(wait, 4) for wait in waits],
            f"{median(waits) * 1e3:.0f} ms; 4,000-token prefill in steps of 2,048; urgent turns 0.8 to 2.4 s into it",
        ),
        Row(
            "prefill throughput lost to the interrupt",
            median(lost),
            "",
            0.05,
            "lower",
            Baseline("the same prefill undisturbed, tokens per CPU s", median(calm)),
            [round(share, 4) for share in lost],
            "prompt tokens per CPU second, the urgent turn's counted; what an aborted step had begun is the loss",
        ),
    ]


def _waits_without(model: LanguageModel) -> list[float]:
    engine, runner = _engine(model, interrupts=False)
    waits = [_race(engine, f"plain{number}", number).wait_s for number in range(2)]
    engine.stop()
    runner.close()
    return waits


def _engine(model: LanguageModel, *, interrupts: bool) -> tuple[Engine, LlamaRunner]:
    runner = LlamaRunner(model, kv_tokens=8192, slot_count=4, mode=ContextMode.UNIFIED, threads=1, step_tokens=2048)
    scheduler = SchedulerConfig(step_tokens=2048, mixed_prefill_tokens=2048)
    engine = Engine(model, runner, EngineConfig(kv_tokens=8192, interrupts=interrupts, scheduler=scheduler))
    engine.start()
    return engine, runner


@dataclass(frozen=True, slots=True)
class _Raced:
    wait_s: float
    """To the urgent turn's first token; 0 without one."""
    tokens_per_cpu_s: float


def _race(engine: Engine, name: str, number: int | None) -> _Raced:
    """A long prefill, and an urgent turn within it unless `number` is None.

    CPU seconds: what a busy neighbour takes away is no loss of ours, and an engine with turns never sleeps.
    """
    began = time.process_time()
    long = _submit(engine, f"long-{name}", f"{name}:" + " the" * PROMPT_TOKENS, None)
    wait_s, tokens = 0.0, 0
    if number is not None:
        time.sleep(0.8 * (number + 1))
        urgent = _end(_submit(engine, f"urgent-{name}", "Hello", Slo(ttft_ns=10**8)))
        wait_s, tokens = (urgent.ttft_ns or 0) / 1e9, urgent.prompt_tokens
    tokens += _end(long).prompt_tokens
    return _Raced(wait_s, tokens / (time.process_time() - began))


def _submit(engine: Engine, session: str, prompt: str, slo: Slo | None) -> queue.SimpleQueue[TurnEvent]:
    events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
    tenant = TenantId("urgent" if slo else "long")
    request = TurnRequest(SessionId(session), tenant, prompt, max_tokens=1, ephemeral=True, slo=slo or Slo())
    engine.submit(request, events.put)
    return events


def _end(events: queue.SimpleQueue[TurnEvent]) -> TurnFinished:
    while not isinstance(event := events.get(timeout=300), TurnFinished):
        pass
    return event
