"""An urgent turn cuts a long prefill short, inside the step, and nothing is lost but part of one micro-batch."""

from __future__ import annotations

import time

import pytest
from equipoise.gpuctl.engine.compute.runner import ContextMode
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import SessionId, Slo
from equipoise.tests.gpuctl.engine.asking import Asked
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven

LONG = "The quick brown fox jumps over the lazy dog. " * 140


def test_within_a_tenant_the_turn_with_the_least_margin_goes_first():
    driven = Driven(max_running=1)
    driven.turn("first", "p" * 10, 3)
    driven.steps(1)
    relaxed = driven.turn("relaxed", "p" * 10, 3)
    urgent = driven.turn("urgent", "p" * 10, 3, slo=Slo(ttft_ns=SECOND))
    driven.steps(7)
    assert urgent.end is not None
    assert relaxed.end is None


@pytest.mark.parametrize("prompt", ["p" * 10, "p"], ids=["ten tokens", "one token"])
def test_an_awaited_first_token_shares_its_step_with_no_other_prompt(prompt):
    driven = Driven(step_tokens=32, mixed_prefill_tokens=32)
    driven.turn("long", "x" * 200, 3)
    driven.steps(1)
    before = driven.engine._ledger.holding(SessionId("long")).device_tokens
    urgent = driven.turn("urgent", prompt, 1, slo=Slo(ttft_ns=SECOND))
    driven.steps(1)
    assert urgent.end is not None
    assert driven.engine._ledger.holding(SessionId("long")).device_tokens == before < 200


def test_an_slo_buys_nothing_from_a_tenant_that_had_less():
    driven = Driven(max_running=1)
    driven.turn("first", "p" * 50, 20, tenant="greedy")
    driven.steps(3)
    urgent = driven.turn("urgent", "p" * 10, 3, tenant="greedy", slo=Slo(ttft_ns=1))
    other = driven.turn("other", "p" * 10, 3, tenant="modest")
    for _ in range(200):
        driven.steps(1)
        if other.end or urgent.end:
            break
    assert other.end is not None
    assert urgent.end is None


@pytest.mark.engine
@pytest.mark.parametrize("interrupts", [True, False])
def test_an_urgent_turn_does_not_wait_for_the_step_to_end(model, make_runner, interrupts):
    runner = make_runner(kv_tokens=2048, slot_tokens=2048, step_tokens=1536, mode=ContextMode.UNIFIED, slot_count=4)
    scheduler = SchedulerConfig(step_tokens=1536)
    engine = Engine(model, runner, EngineConfig(kv_tokens=2048, scheduler=scheduler, interrupts=interrupts))
    engine.start()
    try:
        slow = Asked(engine, "slow", "So: " + LONG, 4)
        computed_s = time.process_time()
        until = time.monotonic() + 60
        while time.process_time() < computed_s + 0.5:  # well into the prefill, however long that takes beside others
            assert time.monotonic() < until, "it does not compute"
            time.sleep(0.01)
        began = time.monotonic()
        urgent = Asked(engine, "urgent", "Hello", 1, slo=Slo(ttft_ns=100_000_000))
        urgent_end = urgent.finish()
        slow_end = slow.finish()
        left_s = time.monotonic() - began
        assert slow_end.prompt_tokens > 1000
        assert slow_end.recomputed_tokens == 0
        wait_s = (urgent_end.ttft_ns or 0) / 1e9
        if not interrupts:
            assert engine.totals.interrupted_steps == 0
            assert wait_s > left_s / 4
            return
        assert engine.totals.interrupted_steps == 1
        assert wait_s < left_s / 4, "a small part of what the long prefill still had to do"
        # The interrupted prefill came to the same end as one left in peace.
        again = Asked(engine, "again", "So: " + LONG, 4)
        again.finish()
        assert again.text == slow.text
    finally:
        engine.stop()
