"""Swapping: what a second swap-out moves, what a swap takes, and what it costs the turns that decode meanwhile."""

from __future__ import annotations

import itertools
import queue
import time
from statistics import median

from equipoise.gpuctl.directives import Outcome, SwapIn, SwapOut
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.runner import ContextMode, LlamaRunner
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.sequence import (
    SessionId,
    TenantId,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
)
from equipoise.gpuctl.engine.tiers.table import in_memory
from equipoise.gpuctl.reports import Reported, SessionMoved
from equipoise.policies.model import KvTier
from equipoise.tests.bench.report import Baseline, Row

CONTEXT_TOKENS = 2048
GROWTH_TOKENS = 64


class _Bench:
    def __init__(self, model: LanguageModel) -> None:
        self._runner = LlamaRunner(model, kv_tokens=8192, slot_count=8, mode=ContextMode.UNIFIED, threads=1)
        self.engine = Engine(model, self._runner, EngineConfig(kv_tokens=8192), in_memory(1 << 30))
        self.engine.start()
        self._reports: queue.SimpleQueue[Reported] = queue.SimpleQueue()
        self.engine.listen(self._reports.put)
        self._names = itertools.count()

    def turn(self, session: str, prompt: str, tokens: int, *, ephemeral: bool = False) -> queue.SimpleQueue[TurnEvent]:
        events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        request = TurnRequest(
            SessionId(session),
            TenantId("t"),
            prompt,
            max_tokens=tokens,
            ephemeral=ephemeral,
            ignore_end_of_text=True,
        )
        self.engine.submit(request, events.put)
        return events

    def complete(self, session: str, prompt: str, tokens: int) -> str:
        events, text = self.turn(session, prompt, tokens), ""
        while not isinstance(event := events.get(timeout=120), TurnFinished):
            text += event.text if isinstance(event, TextDelta) else ""
        return text

    def swap(self, session: str, *, out: bool) -> SessionMoved:
        name = f"swap-{next(self._names)}"
        common = {"directive_id": name, "deadline_ns": time.monotonic_ns() + 10**10, "session_id": SessionId(session)}
        self.engine.direct(SwapOut(**common, tier=KvTier.HOST) if out else SwapIn(**common))  # type: ignore[arg-type]
        moved: SessionMoved | None = None
        while True:
            report = self._reports.get(timeout=30).report
            if isinstance(report, SessionMoved) and report.directive_id == name:
                moved = report
            if isinstance(report, Outcome) and report.directive_id == name and report.status.final:
                assert moved is not None, report
                return moved

    def close(self) -> None:
        self.engine.stop()
        self._runner.close()


def rows(model: LanguageModel) -> list[Row]:
    bench = _Bench(model)
    try:
        return [*_incremental(bench, model), _while_swapping(bench, model)]
    finally:
        bench.close()


def _words(model: LanguageModel, tokens: int) -> str:
    """A text of exactly so many tokens."""
    text = " the" * tokens
    assert len(model.tokenize(text)) == tokens
    return text


def _incremental(bench: _Bench, model: LanguageModel) -> list[Row]:
    prompt = _words(model, CONTEXT_TOKENS)
    text = bench.complete("big", prompt, 1)
    first = bench.swap("big", out=True)
    back = bench.swap("big", out=False)
    prompt += text + _words(model, GROWTH_TOKENS - 2)
    bench.complete("big", prompt, 2)
    second = bench.swap("big", out=True)
    joined = bench.swap("big", out=False)
    timings = [bench.swap("big", out=out).duration_ns / 1e6 for out in (True, False) * 3]
    began = time.perf_counter()
    again = bench.turn("again", _words(model, CONTEXT_TOKENS), 1, ephemeral=True)
    while not _ended(again):
        time.sleep(0.001)
    recompute_ms = (time.perf_counter() - began) * 1e3
    return [
        Row(
            "second swap-out after 64 tokens more, bytes of the first",
            second.moved_bytes / first.moved_bytes,
            "",
            0.10,
            "lower",
            Baseline("first swap-out, bytes", float(first.moved_bytes)),
            [second.moved_bytes],
            f"{first.tokens} tokens, then {second.tokens}",
        ),
        Row(
            "swap out + in of 2,048 tokens",
            (first.duration_ns + back.duration_ns) / 1e6,
            "ms",
            None,
            "lower",
            Baseline("recompute, ms", recompute_ms),
            [
                first.duration_ns / 1e6,
                back.duration_ns / 1e6,
                second.duration_ns / 1e6,
                joined.duration_ns / 1e6,
                *timings,
            ],
            "runs: first out, in, second out, in of two pieces, then unchanged out/in",
        ),
    ]


def _while_swapping(bench: _Bench, model: LanguageModel, rounds: int = 4) -> Row:
    """Four turns decode; meanwhile a 1,024-token session goes out and comes back, growing each time, without pause."""
    prompt = _words(model, 1024)
    prompt += bench.complete("mover", prompt, 1)
    calm, busy, swaps = [], [], 0
    for number in range(rounds):
        calm.append(_decode_speed(bench, number * 2, None)[0])
        speed, count = _decode_speed(bench, number * 2 + 1, "mover")
        busy.append(speed)
        swaps += count
    return Row(
        "decode while swapping, ratio to without",
        median(busy) / median(calm),
        "",
        0.9,
        "higher",
        Baseline("without, tokens/s", median(calm)),
        [round(b / c, 4) for b, c in zip(busy, calm, strict=True)],
        f"{swaps / rounds:.0f} moves of 1,024 tokens a round, the first out copying all of it; batch of 4",
    )


def _decode_speed(bench: _Bench, number: int, mover: str | None) -> tuple[float, int]:
    began = time.perf_counter()
    turns = [bench.turn(f"d{number}-{n}", f"Story {number} {n}:", 96, ephemeral=True) for n in range(4)]
    swaps = 0
    left = list(turns)
    while left:
        if mover is not None:
            bench.swap(mover, out=True)
            bench.swap(mover, out=False)
            swaps += 2
            time.sleep(0.1)
        left = [events for events in left if not _ended(events)]
        time.sleep(0.001)
    return 4 * 96 / (time.perf_counter() - began), swaps


def _ended(events: queue.SimpleQueue[TurnEvent]) -> bool:
    while not events.empty():
        if isinstance(events.get(), TurnFinished):
            return True
    return False
