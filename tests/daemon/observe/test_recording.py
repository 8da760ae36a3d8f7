"""What of calls is written down, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from equipoise.daemon.observe.journal import Journal, JournalReader, Sample, Series
from equipoise.daemon.observe.recording import Recorder
from equipoise.policies.events import Event, ProcessesGone, SandboxRegistered, ToolCallEnded, ToolCallMerged
from equipoise.policies.model import MIB, ToolCall, ToolCallId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import ns, policy, sandbox, started


class Bench:
    def __init__(self, journal: Journal, folder: Path) -> None:
        self.state = State(policy()).apply(SandboxRegistered(0, sandbox()))
        self.stale = self.state.snapshot(0)
        self.recorder = Recorder(journal, self.state, lambda: self.stale)
        self._path = folder / "journal.sqlite"

    def hear(self, *events: Event) -> None:
        for event in events:
            self.state.apply(event)
            self.recorder(event, self.state)

    def turned(self) -> tuple[ToolCall, ...]:
        """What a reader finds after the turn."""
        self.recorder.turned(self.stale)
        with JournalReader(self._path) as reader:
            return reader.tool_calls()


def test_a_call_is_on_disk_when_the_turn_that_heard_of_it_ends(journal: Journal, tmp_path: Path) -> None:
    bench, begun = Bench(journal, tmp_path), started(1.0)
    bench.hear(begun)
    assert [(call.id, call.running) for call in bench.turned()] == [(begun.id, True)]
    bench.hear(ToolCallEnded(ns(2.0), begun.id, 3, None), ProcessesGone(ns(2.0), begun.id))
    assert [(call.id, call.exit_code) for call in bench.turned()] == [(begun.id, 3)]


def test_a_call_that_became_another_within_a_turn_is_not_written_down(journal: Journal, tmp_path: Path) -> None:
    bench, announced = Bench(journal, tmp_path), started(1.0)
    seen = replace(announced, id=ToolCallId(announced.id + 1), pid=77)
    bench.hear(announced, seen, ToolCallMerged(ns(1.5), announced.id, seen.id))
    assert [call.id for call in bench.turned()] == [seen.id]


def test_an_old_picture_does_not_make_an_ended_call_run_again(journal: Journal, tmp_path: Path) -> None:
    bench, begun = Bench(journal, tmp_path), started(1.0)
    bench.hear(begun)
    bench.stale = bench.state.snapshot(ns(1.0))
    bench.hear(ToolCallEnded(ns(2.0), begun.id, 3, None))
    bench.turned()
    bench.recorder._record_changes()
    assert [call.exit_code for call in bench.turned()] == [3]


def test_what_stands_still_is_drawn_seldom_and_what_moves_at_once(journal: Journal, tmp_path: Path) -> None:
    bench = Bench(journal, tmp_path)

    def drawn(seconds: float, mib: int) -> list[int]:
        sample = Sample(ns(seconds), Series.SANDBOX_MEMORY, sandbox().tenant, "gold/ada", mib * MIB)
        return [point.value_bytes // MIB for point in bench.recorder._worth_a_point([sample])]

    assert [drawn(at, 10) for at in (0.0, 0.5, 4.9, 5.0, 5.5)] == [[10], [], [], [10], []]
    assert [drawn(6.0, 30), drawn(6.5, 60), drawn(7.0, 60)] == [[30], [60], []]
