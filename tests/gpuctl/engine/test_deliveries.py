"""What crosses from the engine's thread to an event loop: in order, at once, and woken once per step."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from equipoise.gpuctl.engine.engine_thread import Deliveries
from equipoise.gpuctl.engine.schedule.sequence import SessionId, TenantId, TextDelta, TurnFinished, TurnRequest
from equipoise.tests.gpuctl.engine.driving import Driven


class CountedLoop:
    """Counts how often it is woken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wakes = 0

    def call_soon_threadsafe(self, function: Any) -> None:
        self.wakes += 1
        self._loop.call_soon_threadsafe(function)


@pytest.fixture
def driven():
    driven = Driven()
    yield driven
    driven.engine.stop()


async def test_all_that_a_step_of_several_turns_brings_wakes_the_loop_once(driven):
    deliveries, loop = Deliveries(driven.engine), CountedLoop(asyncio.get_running_loop())
    seen: dict[str, list[Any]] = {f"s{n}": [] for n in range(4)}
    ended = asyncio.Event()

    def sink_of(name: str):
        def arrived(event):
            seen[name].append(event)
            if all(isinstance(events[-1], TurnFinished) for events in seen.values() if events) and all(seen.values()):
                ended.set()

        return lambda event: deliveries.put(cast(Any, loop), lambda: arrived(event))

    for name in seen:
        request = TurnRequest(SessionId(name), TenantId("t"), f"hello {name}", max_tokens=20)
        driven.engine.submit(request, sink_of(name))
    driven.engine.start()
    async with asyncio.timeout(10):
        await ended.wait()
    for name, events in seen.items():
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert text == driven.runner.expected_output(f"hello {name}", 20)
    steps = driven.engine.totals.steps
    assert loop.wakes <= steps + 2, "88 events, but at most one wake-up before each step and one at the end"


async def test_what_another_thread_says_does_not_wait_for_a_step(driven):
    deliveries, loop = Deliveries(driven.engine), asyncio.get_running_loop()
    came = asyncio.Event()
    deliveries.put(loop, came.set)  # the engine's thread has not even started
    async with asyncio.timeout(5):
        await came.wait()


async def test_what_is_said_after_the_loops_end_arrives(driven):
    deliveries, loop = Deliveries(driven.engine), asyncio.get_running_loop()
    driven.engine.start()
    driven.engine.stop()
    events: asyncio.Queue[Any] = asyncio.Queue()
    request = TurnRequest(SessionId("late"), TenantId("t"), "hello")
    driven.engine.submit(request, lambda event: deliveries.put(loop, lambda: events.put_nowait(event)))
    async with asyncio.timeout(5):
        assert "stopping" in str((await events.get()).error)
