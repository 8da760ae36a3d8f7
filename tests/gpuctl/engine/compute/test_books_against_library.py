"""The ledger against what llama.cpp itself says it holds, after every step of a random life of an engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.engine.compute.runner import BatchSlice, ContextMode, StepStatus
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.cost_figures import CostFigures
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import (
    SessionId,
    Slo,
    Slot,
    TenantId,
    TextDelta,
    TurnAccepted,
    TurnEvent,
    TurnFinished,
    TurnRequest,
)
from equipoise.gpuctl.engine.tiers.disk_tier import DiskTier
from equipoise.gpuctl.engine.tiers.table import DISK, OpenTier, in_memory
from equipoise.policies.model import KvTier

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SESSIONS = [SessionId(name) for name in "abcdef"]
SECOND = 10**9
SYSTEM = "You are one of several agents that work on the same task. Answer in few words and ask when in doubt. "


class Life:
    """An engine driven step by step over the real library, and clients that talk to it at random."""

    def __init__(self, model: Any, runner: Any, disk: DiskTier, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = SECOND
        self.runner = runner
        config = EngineConfig(
            kv_tokens=300,
            scheduler=SchedulerConfig(
                step_tokens=64,
                mixed_prefill_tokens=32,
                share_prefix_tokens=8 if runner.mode is ContextMode.UNIFIED else None,
            ),
        )
        room = 200 * runner.bytes_per_token
        tiers = [*in_memory(room), OpenTier(DISK, room, disk)]
        self.engine = Engine(model, runner, config, tiers, clock=lambda: self.now_ns)
        self.engine.cost = CostFigures(prefill_seconds_per_token=0.001, decode_step_seconds=0.01)
        self.text: dict[SessionId, str] = {}
        self.told: list[str] = []  # conversations of clients that name no session
        self.continued = 0
        self.busy: dict[SessionId, list[TurnEvent]] = {}
        self.ended = 0
        self.directives = 0

    def act(self) -> None:
        session = self.random.choice(SESSIONS)
        what = self.random.random()
        if what < 0.35 and session not in self.busy:
            prompt = self.text.get(session, "") + " a small thing" * self.random.randint(1, 8)
            self.ask(session, prompt if len(prompt) < 500 else " begin again" * 4, TenantId(session))
        elif what < 0.45:
            for _ in range(self.random.randint(2, 4)):  # a group
                self.directives += 1
                name = SessionId(f"member-{self.directives}")
                slo = self.random.choice([Slo(), Slo(tpot_ns=SECOND // 50)])
                self.ask(name, f"{SYSTEM}You have number {self.directives}.", TenantId("agents"), slo=slo)
        elif what < 0.6:
            self.directives += 1
            told = self.random.choice([text for text in self.told if len(text) < 500] or [SYSTEM])
            name = SessionId(f"unnamed-{self.directives}")
            self.ask(name, f"{told} And then?", TenantId("agents"), anonymous=True)
        else:
            self.engine.direct(self.directive(session))
        self.now_ns += self.random.randint(0, 3 * SECOND)

    def ask(self, session: SessionId, prompt: str, tenant: TenantId, **options: Any) -> None:
        events: list[TurnEvent] = []
        request = TurnRequest(session, tenant, prompt, max_tokens=self.random.randint(1, 10), **options)
        turn_id = self.engine.submit(request, events.append)
        self.busy[session] = events
        self.text[session] = prompt
        if self.random.random() < 0.1:
            self.engine.cancel(turn_id)

    def directive(self, session: SessionId) -> Any:
        self.directives += 1
        common = {
            "directive_id": f"d{self.directives}",
            "deadline_ns": self.now_ns + 5 * SECOND,
            "session_id": session,
        }
        return self.random.choice(
            [
                ask.SwapOut(**common, tier=self.random.choice([KvTier.HOST, KvTier.DISK])),  # type: ignore[arg-type]
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
                accepted = events[0]
                assert isinstance(accepted, TurnAccepted)
                if session.startswith("unnamed"):
                    self.told.append(self.text[session])
                    self.continued += accepted.session_id != session
                self.ended += 1
                del self.busy[session]

    def compare(self) -> None:
        ledger = self.engine._ledger
        ledger.check_integrity()
        self.engine._scheduler.groups.check_integrity()
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
    assert life.continued > 0
    assert (life.engine.totals.shared_tokens > 0) == (mode is ContextMode.UNIFIED)
    assert life.engine.totals.swap_failures == 0
    disk.close()


def test_what_nested_sharing_spares_in_the_books_is_really_free_in_the_library(make_runner, model):
    runner = make_runner(mode=ContextMode.UNIFIED, kv_tokens=512, slot_count=4, step_tokens=64)
    ledger = Ledger(device_capacity_tokens=runner.physical_tokens, slot_count=4, bytes_per_token=runner.bytes_per_token)
    names = [SessionId(name) for name in "abcd"]

    def grow(name: SessionId, count: int) -> StepStatus:
        slot = ledger.open(name)
        while count:
            part = min(count, 64)
            tokens = [(7 * i) % 1000 + 3 for i in range(part)]
            status = runner.step([BatchSlice(slot, ledger.holding(name).device_tokens, tokens)]).status
            if status is not StepStatus.DONE:
                return StepStatus(status)
            ledger.grow(name, part)
            count -= part
        return StepStatus.DONE

    def share(donor: SessionId, name: SessionId, tokens: int) -> None:
        slot, source = ledger.open(name), ledger.holding(donor).slot
        ledger.share(donor, name, tokens)
        runner.share(source, slot, tokens)

    assert grow(names[0], 200) is StepStatus.DONE
    for donor, name, tokens in ((0, 1, 180), (1, 2, 90), (0, 3, 120)):
        share(names[donor], names[name], tokens)
        assert grow(names[name], 60) is StepStatus.DONE
    assert ledger.device_used_tokens == 200 + 3 * 60
    # The donor of all of it leaves: only what it alone used is free.
    freed = ledger.freed_by_leaving(names[0])
    runner.cut(ledger.holding(names[0]).slot, 0)
    ledger.leave_device(names[0])
    ledger.check_integrity()
    assert (freed, ledger.device_used_tokens) == (20, 360)
    assert grow(names[3], ledger.device_free_tokens) is StepStatus.DONE, "the library is full where the books are not"
    assert grow(names[2], 1) is StepStatus.NO_ROOM, "the library has more than the books say"
