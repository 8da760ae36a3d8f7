"""Writing the journal: events as they happen, calls as they begin, change and end, points of the timeline between.

What the next start needs to take up what lives on (sandboxes, calls that begin and end) is on disk before anybody is
answered; the rest is written twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from ...policies.events import (
    Event,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallJoined,
    ToolCallMerged,
    ToolCallStarted,
    ToolCallWithdrawn,
)
from ...policies.model import NS_PER_S, ToolCall, ToolCallId
from ...policies.snapshot import Snapshot
from ...policies.state import State
from .journal import Journal, Sample, Series
from .samples import samples_of

SAMPLE_S = 0.5
"""Between two points of the journal's timeline, and two writes of what waits."""

POINT_NS = 5 * NS_PER_S
"""A line of the timeline that stands still has a point so often."""
STILL_BYTES = 1 << 20


class Recorder:
    """A sink of the loop, and a hook of its turns; `run()` samples and flushes until cancelled."""

    def __init__(self, journal: Journal, state: State, snapshot: Callable[[], Snapshot]) -> None:
        self._journal = journal
        self._state = state
        self._snapshot = snapshot
        self._urgent = False
        self._drawn: dict[tuple[Series, str, str], Sample] = {}
        """The newest point of each line of the timeline."""
        self._written: dict[ToolCallId, tuple[object, ...]] = {}
        """Of each call that lives: what was last written of it and changes."""
        self._waiting: dict[ToolCallId, ToolCall] = {}
        """Of each call that an event of this turn was about, how it is now: a short one begins and ends in one turn."""

    def __call__(self, event: Event, state: State) -> None:
        self._journal.record(event)
        if isinstance(event, ToolCallMerged | ToolCallWithdrawn):
            self._waiting.pop(event.id, None)  # it is struck out
        match event:
            case (
                ToolCallStarted(id=tool_call)
                | ToolCallAttributed(id=tool_call)
                | ToolCallJoined(id=tool_call)
                | ToolCallMerged(into=tool_call)
                | ToolCallEnded(id=tool_call)
                | ProcessesGone(id=tool_call)
            ):
                self._urgent = True
                if call := state.tool_calls.get(state.resolve(tool_call)):
                    self._waiting[call.id] = call
            case SandboxRegistered() | SandboxRemoved() | ToolCallWithdrawn():
                self._urgent = True
            case _:
                pass

    def turned(self, snapshot: Snapshot) -> None:
        """At the end of a turn."""
        for call in self._waiting.values():
            self._journal.record_tool_call(call)
        self._waiting.clear()
        if self._urgent:
            self._urgent = False
            self._journal.flush()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._record_changes()
            self._journal.record_samples(self._worth_a_point(samples_of(self._snapshot())))
            self._journal.flush()

    def _worth_a_point(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """What has moved, or was not written down for long: 200 sandboxes that stand still are 400 rows a second."""
        drawn: dict[tuple[Series, str, str], Sample] = {}
        for sample in samples:
            key = (sample.series, sample.tenant, sample.key)
            last = self._drawn.get(key)
            moved = last is None or abs(sample.value_bytes - last.value_bytes) >= STILL_BYTES
            if last is None or moved or sample.at_ns - last.at_ns >= POINT_NS:
                drawn[key] = sample
                yield sample
            else:
                drawn[key] = last
        self._drawn = drawn

    def _record_changes(self) -> None:
        """Peaks, budgets and grants of calls that live, so that they are known after a kill -9.

        Not from the snapshot: a turn that failed leaves an old one, and an ended call would be written down as running.
        """
        living = {call.id: call for call in self._state.tool_calls.values() if call.gone_ns is None}
        for call in living.values():
            if self._written.get(call.id) != (now := _changing(call)):
                self._written[call.id] = now
                self._journal.record_tool_call(call)
        for gone in self._written.keys() - living.keys():
            del self._written[gone]


def _changing(call: ToolCall) -> tuple[object, ...]:
    return (
        call.peak_bytes,
        call.soft_bytes,
        call.hard_bytes,
        call.granted_ns,
        call.phase,
        call.stalled_ns,
        call.verdict,
        call.facts,
    )
