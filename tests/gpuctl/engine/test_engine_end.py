"""How the step loop ends, told to or by a fault of its own: nobody is left waiting for an answer."""

from __future__ import annotations

import threading
import time

import pytest
from equipoise.gpuctl.engine.errors import FAILED, STOPPING, EngineError
from equipoise.gpuctl.engine.schedule.sequence import FinishReason, TurnAccepted
from equipoise.tests.gpuctl.engine.driving import Driven, Turn
from equipoise.tests.gpuctl.engine.fakes import FakeRunner

WAIT_S = 10.0


class GatedRunner(FakeRunner):
    """Computes 5 steps at once and each one after that when it is let; `fault` makes it raise then instead."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.at_gate, self.gate = threading.Event(), threading.Event()
        self.fault: Exception | None = None

    def step(self, slices):
        self.steps += 1
        if self.steps > 5:
            self.at_gate.set()
            assert self.gate.wait(WAIT_S)
            if self.fault is not None:
                raise self.fault
        return super().step(slices)


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture
def driven(runner):
    driven = Driven(runner=runner)
    yield driven
    runner.gate.set()
    driven.engine.stop()


def under_way(driven: Driven, runner: GatedRunner) -> tuple[Turn, Turn]:
    """A turn that is being computed, and one that waits behind it."""
    turn = driven.turn("a", "hello", tokens=100)
    behind = driven.turn("a", "hello again", tokens=5)
    driven.engine.start()
    assert runner.at_gate.wait(WAIT_S)
    return turn, behind


def refusal(turn: Turn) -> tuple[int, str]:
    assert len(turn.events) == 1, turn.events
    assert turn.refusal is not None
    return turn.refusal.error.status, str(turn.refusal.error)


def wait_until(condition) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_stop_ends_the_turn_under_way_and_refuses_the_one_behind_it(driven, runner):
    turn, behind = under_way(driven, runner)
    runner.gate.set()
    driven.engine.stop()
    assert turn.end is not None
    assert (turn.end.reason, turn.end.error) == (FinishReason.ERROR, STOPPING)
    assert refusal(behind) == (503, STOPPING), "not begun only to be forgotten"


def test_a_turn_that_comes_after_the_stop_is_refused(driven, runner):
    runner.gate.set()
    driven.engine.start()
    driven.engine.stop()
    assert refusal(driven.turn("late", "hello")) == (503, STOPPING)
    assert not driven.engine.failed


def test_who_asks_for_the_books_after_the_end_is_told_at_once(driven, runner):
    runner.gate.set()
    driven.engine.start()
    assert driven.engine.books_now()[0].device_used_tokens == 0
    driven.engine.stop()
    began = time.monotonic()
    with pytest.raises(EngineError, match=STOPPING):
        driven.engine.books_now(timeout_s=WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2, "a scrape must not hold up the process's end"


def test_a_fault_on_the_engines_thread_ends_every_turn_with_an_error_and_refuses_new_ones(driven, runner, caplog):
    turn, behind = under_way(driven, runner)
    unseen = driven.turn("b", "just arrived")
    runner.fault = RuntimeError("a fault of ours")
    runner.gate.set()
    wait_until(lambda: unseen.events)
    assert isinstance(turn.events[0], TurnAccepted)
    assert turn.end is not None
    assert (turn.end.reason, turn.end.error) == (FinishReason.ERROR, FAILED)
    assert (turn.end.output_tokens, turn.end.cost.pte) == (5, None)
    assert refusal(behind) == (503, FAILED)
    assert refusal(unseen) == (503, FAILED)
    assert refusal(driven.turn("late", "hello")) == (503, FAILED)
    assert driven.engine.failed
    (logged,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert logged.getMessage() == "engine_failed turns=1"
    assert logged.exc_info[1] is runner.fault
