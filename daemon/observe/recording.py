"""Writing the journal: events as they happen, tool calls as they begin and end, points of the timeline between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...policies.events import Event, ProcessesGone, ToolCallEnded, ToolCallStarted
from ...policies.snapshot import Snapshot
from ...policies.state import State
from .journal import Journal
from .samples import samples_of

SAMPLE_S = 0.5
"""Between two points of the journal's timeline, and two writes of what waits."""


class Recorder:
    """A sink of the loop; `run()` samples and flushes until cancelled."""

    def __init__(self, journal: Journal, snapshot: Callable[[], Snapshot]) -> None:
        self._journal = journal
        self._snapshot = snapshot

    def __call__(self, event: Event, state: State) -> None:
        self._journal.record(event)
        match event:
            case ToolCallStarted(id=tool_call) | ToolCallEnded(id=tool_call) | ProcessesGone(id=tool_call):
                if call := state.tool_calls.get(state.resolve(tool_call)):
                    self._journal.record_tool_call(call)
            case _:
                pass

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._journal.record_samples(samples_of(self._snapshot()))
            self._journal.flush()
