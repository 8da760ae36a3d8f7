"""The loop: the order of things in a turn, and what it does when something in it goes wrong."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from equipoise.daemon import loop as loop_module
from equipoise.daemon.loop import COOL_DOWN_NS, Loop, tick
from equipoise.policies.actions import Decision, Grant, Outcome, OutcomeStatus, Throttle
from equipoise.policies.events import Event, OutcomeObserved, SandboxRegistered
from equipoise.policies.model import MIB, ToolCallPhase
from equipoise.policies.policy import Mode, Policy
from equipoise.policies.state import State
from equipoise.tests.policies.facts import host_sampled, ns, policy, reached, sandbox, started, stepped, the_call


class Bench:
    """A loop over a real State, with a clock and an actuator of the test's own, and a record of what came to pass."""

    def __init__(self, of: Policy | None = None, answer: OutcomeStatus | None = OutcomeStatus.COMPLETED) -> None:
        self.now_ns = ns(1.0)
        self.answer = answer
        self.seen: list[str] = []
        self.acted: list[Decision] = []
        self.state = State(of or policy())
        self.loop = Loop(self.state, self.act, (self.sink,), lambda: self.now_ns, tick_s=0.01)
        self.loop.every_turn(lambda snapshot: self.seen.append("turn ends"))

    def sink(self, event: Event, state: State) -> None:
        self.seen.append(type(event).__name__)

    def act(self, decision: Decision) -> Outcome | None:
        self.seen.append(f"act {type(decision.action).__name__}")
        self.acted.append(decision)
        return Outcome(decision.id, self.answer, self.now_ns, "test") if self.answer is not None else None

    def call_at_its_budget(self) -> None:
        for event in (SandboxRegistered(0, sandbox()), host_sampled(), started(0.5), reached(0.9)):
            self.loop.emit(event)


def test_a_turn_takes_in_decides_notes_acts_and_takes_in_what_came_of_it():
    bench = Bench()
    bench.call_at_its_budget()
    snapshot = bench.loop.turn()
    assert bench.seen == [
        "SandboxRegistered", "HostSampled", "ToolCallStarted", "BudgetReached",
        "DecisionMade", "act Grant", "OutcomeObserved", "turn ends",
    ]  # fmt: skip
    assert snapshot is bench.loop.snapshot and bench.loop.turn_count == 1
    assert snapshot.tool_calls[0].phase is ToolCallPhase.RUNNING, "the outcome is in the picture already"
    assert snapshot.tool_calls[0].hard_bytes == 768 * MIB


def test_an_outcome_may_come_later_as_an_event():
    bench = Bench(answer=None)
    bench.call_at_its_budget()
    bench.loop.turn()
    assert [type(d.action) for d in bench.acted] == [Grant]
    assert "OutcomeObserved" not in bench.seen
    bench.loop.emit(OutcomeObserved(bench.now_ns, Outcome(bench.acted[0].id, OutcomeStatus.COMPLETED, 0, "late")))
    bench.loop.turn()
    assert the_call(bench.state).phase is ToolCallPhase.RUNNING and len(bench.acted) == 1


@pytest.mark.parametrize("status", [OutcomeStatus.FAILED, OutcomeStatus.REJECTED])
def test_what_failed_is_tried_again_only_after_the_cool_down(status):
    bench = Bench(answer=status)
    bench.call_at_its_budget()
    bench.loop.turn()
    bench.now_ns += COOL_DOWN_NS - 1
    bench.loop.turn()
    assert len(bench.acted) == 1
    bench.now_ns += 1
    bench.loop.turn()
    assert len(bench.acted) == 2


def test_observing_notes_decisions_and_does_nothing():
    bench = Bench(replace(policy(), mode=Mode.DRY_RUN))
    bench.call_at_its_budget()
    bench.loop.turn()
    assert not bench.acted
    assert bench.seen[-3:] == ["DecisionMade", "OutcomeObserved", "turn ends"]
    bench.loop.turn()
    assert bench.seen.count("DecisionMade") == 1, "the same is not said again at every turn"


def test_events_emitted_while_acting_are_in_the_turns_snapshot():
    bench = Bench()
    acts = bench.act

    def act(decision: Decision) -> Outcome | None:
        bench.loop.emit(stepped(1.0, 600))
        return acts(decision)

    bench.loop._act = act
    bench.call_at_its_budget()
    assert bench.loop.turn().tool_calls[0].used_bytes == 600 * MIB


def test_a_full_queue_loses_the_oldest_and_counts_them(monkeypatch):
    monkeypatch.setattr(loop_module, "QUEUE_LENGTH", 3)
    bench = Bench()
    bench.loop.emit(SandboxRegistered(0, sandbox()))
    for at_s in range(4):
        bench.loop.emit(stepped(at_s, 1))
    assert bench.loop.dropped_count == 2
    bench.loop.turn()
    assert bench.seen == ["ToolCallMemoryStepped"] * 3 + ["turn ends"]


async def until(claim) -> None:
    async with asyncio.timeout(5):
        while not claim():
            await asyncio.sleep(0.005)


async def test_an_event_is_taken_in_at_once_and_time_passing_is_reason_enough_to_look():
    bench = Bench()
    bench.loop._tick_s = 60.0
    running = asyncio.create_task(bench.loop.run())
    await asyncio.sleep(0)
    bench.loop.emit(host_sampled())
    await until(lambda: bench.loop.turn_count == 1)
    bench.loop._tick_s = 0.01
    bench.loop.emit(host_sampled())
    await until(lambda: bench.loop.turn_count >= 4)
    bench.loop.stop()
    await asyncio.wait_for(running, 5)


async def test_a_turn_that_fails_is_counted_out_and_the_loop_lives_on(caplog):
    bench = Bench()
    broken = [True]

    def hook(_: object) -> None:
        if broken:
            broken.pop()
            raise RuntimeError("a sink that stumbles")

    bench.loop.every_turn(hook)
    running = asyncio.create_task(bench.loop.run())
    bench.loop.emit(host_sampled())
    await until(lambda: not broken)
    bench.call_at_its_budget()
    await until(lambda: bench.acted)
    assert "turn_failed" in caplog.text and "a sink that stumbles" in caplog.text
    bench.loop.stop()
    await asyncio.wait_for(running, 5)


@pytest.mark.parametrize("steps", range(6))
async def test_an_event_on_its_way_does_not_keep_the_loop_from_ending(steps):
    """Cancelled at each of the steps between an event and its turn: lost once, it is a daemon that never ends."""
    bench = Bench()
    running = asyncio.create_task(bench.loop.run())
    await until(lambda: bench.loop.turn_count)
    bench.loop.emit(host_sampled())
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait((running,), timeout=1.0)
    assert running.cancelled()


def test_a_tick_is_a_turn_without_effects():
    state = State(policy())
    events: list[Event] = [SandboxRegistered(0, sandbox()), host_sampled(), started(0.5), reached(0.9)]
    snapshot, decisions = tick(state, events, ns(1.0), policy())
    assert [type(d.action) for d in decisions] == [Grant]
    assert snapshot.tool_calls[0].phase is ToolCallPhase.STOPPED, "nobody acted"


def test_lasting_pressure_is_answered_by_one_throttle_and_not_by_one_a_turn():
    bench = Bench(policy(pool_mib=512))
    for event in (SandboxRegistered(0, sandbox()), host_sampled(), started(0.5), stepped(0.9, 500)):
        bench.loop.emit(event)
    for _ in range(50):
        bench.now_ns += ns(0.1)
        bench.loop.turn()
    assert [type(d.action) for d in bench.acted] == [Throttle]
