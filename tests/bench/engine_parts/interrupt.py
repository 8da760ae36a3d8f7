"""An urgent turn during a 4,000-token prefill: its wait with and without the interrupt, and what the prefill loses."""

from __future__ import annotations

import queue
import time
from statistics import median

from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.language_model import LanguageModel
from equipoise.gpuctl.engine.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.sequence import SessionId, Slo, TenantId, TurnEvent, TurnFinished, TurnRequest
from equipoise.tests.bench.report import Baseline, Row

PROMPT_TOKENS = 4000
ROUNDS = 2


def rows(model: LanguageModel) -> list[Row]:
    waits: dict[bool, list[float]] = {True: [], False: []}
    spans: dict[bool, list[float]] = {True: [], False: []}
    undisturbed = []
    for interrupts in (False, True):
        runner = LlamaRunner(model, kv_tokens=8192, slot_count=4, mode=ContextMode.UNIFIED, threads=1, step_tokens=2048)
        config = EngineConfig(
            kv_tokens=8192,
            interrupts=interrupts,
            scheduler=SchedulerConfig(step_tokens=2048, mixed_prefill_tokens=2048),
        )
        engine = Engine(model, runner, config)
        engine.start()
        for number in range(ROUNDS):
            wait, span = _race(engine, f"{interrupts}{number}", number)
            waits[interrupts].append(wait)
            spans[interrupts].append(span)
        if interrupts:
            undisturbed = [_race(engine, f"calm{number}", None)[1] for number in range(ROUNDS)]
        engine.stop()
        runner.close()
    with_wait, without = median(waits[True]), median(waits[False])
    lost = median(spans[True]) / median(undisturbed) - 1
    return [
        Row(
            "wait of an urgent turn, ratio to no interrupt",
            with_wait / without,
            "",
            0.1,
            "lower",
            Baseline("without the interrupt, s", without),
            [round(wait, 4) for wait in waits[True]],
            f"{with_wait * 1e3:.0f} ms; 4,000-token prefill in steps of 2,048; urgent turn 0.8 and 1.6 s into it",
        ),
        Row(
            "prefill throughput lost to the interrupt",
            lost,
            "",
            0.05,
            "lower",
            Baseline("the same prefill undisturbed, CPU s", median(undisturbed)),
            [round(span / median(undisturbed) - 1, 4) for span in spans[True]],
            "the urgent turn's own computing included",
        ),
    ]


def _race(engine: Engine, name: str, number: int | None) -> tuple[float, float]:
    """Seconds to the urgent turn's first token, and CPU seconds of the whole race.

    CPU seconds: what a busy neighbour takes away is no loss of ours, and an engine with turns never sleeps.
    """
    began = time.process_time()
    long = _submit(engine, f"long-{name}", f"{name}:" + " the" * PROMPT_TOKENS, None)
    wait = 0.0
    if number is not None:
        time.sleep(0.8 * (number + 1))
        wait = (_end(_submit(engine, f"urgent-{name}", "Hello", Slo(ttft_ns=10**8))).ttft_ns or 0) / 1e9
    _end(long)
    return wait, time.process_time() - began


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
