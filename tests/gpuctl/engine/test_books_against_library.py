"""The ledger against what llama.cpp itself says it holds, after every step of a random life of an engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
from equipoise.gpuctl.engine import directives as ask
from equipoise.gpuctl.engine.disk_tier import DiskTier
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.runner import ContextMode
from equipoise.gpuctl.engine.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.sequence import (
    SessionId,
    Slot,
    TenantId,
    TextDelta,
    Tier,
    TurnEvent,
    TurnFinished,
    TurnRequest,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SESSIONS = [SessionId(name) for name in "abcdef"]
SECOND = 10**9


class Life:
    """An engine driven step by step over the real library, and clients that talk to it at random."""

    def __init__(self, model: Any, runner: Any, disk: DiskTier, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = SECOND
        self.runner = runner
        config = EngineConfig(
            kv_tokens=300,
            host_bytes=200 * runner.bytes_per_token,
            disk_bytes=200 * runner.bytes_per_token,
            scheduler=SchedulerConfig(step_tokens=64, mixed_prefill_tokens=32),
        )
        self.engine = Engine(model, runner, config, disk, clock=lambda: self.now_ns)
        self.text: dict[SessionId, str] = {}
        self.busy: dict[SessionId, list[TurnEvent]] = {}
        self.ended = 0
        self.directives = 0

    def act(self) -> None:
        session = self.random.choice(SESSIONS)
        if self.random.random() < 0.5 and session not in self.busy:
            prompt = self.text.get(session, "") + " a small thing" * self.random.randint(1, 8)
            prompt = prompt if len(prompt) < 500 else " begin again" * 4
            events: list[TurnEvent] = []
            request = TurnRequest(session, TenantId(session), prompt, max_tokens=self.random.randint(1, 10))
            turn_id = self.engine.submit(request, events.append)
            self.busy[session] = events
            self.text[session] = prompt
            if self.random.random() < 0.1:
                self.engine.cancel(turn_id)
        else:
            self.engine.direct(self.directive(session))
        self.now_ns += self.random.randint(0, 3 * SECOND)

    def directive(self, session: SessionId) -> Any:
        self.directives += 1
        common = {
            "directive_id": f"d{self.directives}",
            "deadline_ns": self.now_ns + 5 * SECOND,
            "session_id": session,
        }
        return self.random.choice(
            [
                ask.SwapOut(**common, tier=self.random.choice([Tier.HOST, Tier.DISK])),  # type: ignore[arg-type]
                ask.SwapIn(**common),  # type: ignore[arg-type]
                ask.Drop(**common, from_token=self.random.randint(0, 40)),  # type: ignore[arg-type]
                ask.Hold(**common, ttl_ns=2 * SECOND),  # type: ignore[arg-type]
                ask.Retain(**common, ttl_ns=3 * SECOND),  # type: ignore[arg-type]
                ask.Preempt(**common, mode=self.random.choice(list(ask.PreemptMode))),  # type: ignore[arg-type]
            ]
        )

    def step(self) -> None:
        self.engine.cycle()
        self.compare()
        for session, events in list(self.busy.items()):
            if events and isinstance(events[-1], TurnFinished):
                self.text[session] += "".join(e.text for e in events if isinstance(e, TextDelta))
                self.ended += 1
                del self.busy[session]

    def compare(self) -> None:
        ledger = self.engine._ledger
        ledger.check_integrity()
        if self.engine._scheduler.placement.moves:
            return  # decided at this border, carried out in the next step
        booked = {ledger.holding(s).slot: ledger.holding(s).device_tokens for s in ledger}
        for number in range(self.runner.slot_count):
            assert self.runner.held_tokens(Slot(number)) == booked.get(Slot(number), 0), f"slot {number}"


@pytest.mark.parametrize("mode", list(ContextMode))
def test_the_books_say_what_the_library_holds(make_runner, model, tmp_path, mode):
    runner = make_runner(mode=mode, kv_tokens=512, slot_count=4, slot_tokens=256, step_tokens=64)
    disk = DiskTier(tmp_path / "kv", "test")
    life = Life(model, runner, disk, seed=11)
    for _ in range(60):
        life.act()
        for _ in range(life.random.randint(0, 4)):
            life.step()
    life.now_ns += 3600 * SECOND
    for _ in range(400):
        life.step()
        if not life.busy:
            break
    assert not life.busy, "turns that never end"
    assert life.ended > 15
    assert life.engine.totals.swap_in_count > 0
    assert life.engine.totals.swap_failures == 0
    disk.close()
