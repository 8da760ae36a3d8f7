"""Command lines of persistent shells: each is one tool call, however many programs it starts one after another.

Owns which line of a shell runs, which programs are of it and when it is over. A line begins with the first program that
the shell starts after it was given new input (ToolCallStarted.input_stamp), and ends when the shell waits for the next,
with or without programs left behind. Its call is known by the record of its first program; when that has ended, the
next program is taken into a record of the same id. Rules on nothing: what a program is was said before.

A line of builtins alone starts no program and is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from ....ebpf.errors import EbpfError
from ....ebpf.tool_memory import ToolMemory
from ....policies.events import (
    BudgetReached,
    Event,
    ProcessesGone,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallJoined,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from ....policies.model import NS_PER_S, ToolCallId
from ....policies.state import State
from .. import evidence, processes
from .records import Records

_LOOK_NS = NS_PER_S // 20
"""How often a shell is asked whether it waits for input, besides at the end of each of its programs."""
_OF_CALLS = (ToolCallEnded, ProcessesGone, ToolCallMemoryStepped, BudgetReached)
_LATELY_NS = NS_PER_S
_PAST_COUNT = 32
_PIPELINE = 64
"""Pids that a line's programs are apart at the most: a higher one was forked later."""


@dataclass(slots=True)
class Line:
    """One command line. Its call is the record of its first program, or another one of the same id."""

    started: ToolCallStarted
    shell_pid: int
    told: bool
    """Whether it is a call. Else its programs are looked after by whoever ruled so; it may become one (tell)."""
    last: ToolCallId
    """The record of the program that began last: its exit code is the line's."""
    first_pid: int
    """Of the program that was forked first, as its number shows."""
    parts: set[ToolCallId] = field(default_factory=set)
    """Records of later programs, as the kernel made them; most are empty by now."""
    exit: ToolCallEnded | None = None
    """Of `last`."""
    one_ended: bool = False
    """A program of it has ended: whatever begins now is no part of the same pipeline."""
    peak_bytes: int = 0
    open: bool = True
    over_ns: int = 0
    """When it was seen to be over."""
    alive: bool = True
    """Whether a process is in the call's record."""

    @property
    def call(self) -> ToolCallId:
        return self.started.id


class Lines:
    """`sift` comes before everybody else has an event, `at_turn` is asked at each of the loop's turns."""

    def __init__(self, probes: ToolMemory | None, records: Records, state: State, now_ns: Callable[[], int]) -> None:
        self._probes = probes
        self._records = records
        self._state = state
        self._now_ns = now_ns
        self._newest: dict[ToolCallId, Line] = {}
        """By the shell's record as a parent; over or not."""
        self._past: dict[ToolCallId, dict[int, Line]] = {}
        """Of each shell, its last lines by their stamps: what runs in the background may start something yet."""
        self._of: dict[ToolCallId, Line] = {}
        """By the records of a line's programs."""
        self._looked_ns = 0

    def under_way(self, event: ToolCallStarted) -> Line | None:
        """The line of its shell that this program is of; None: it begins a new one."""
        line = self._newest.get(event.agent) if event.agent is not None else None
        if line is None or event.agent is None or event.input_stamp in (0, line.started.input_stamp):
            return line
        return self._past.get(event.agent, {}).get(event.input_stamp)

    def begin(self, event: ToolCallStarted, shell_pid: int, *, told: bool) -> Iterator[Event]:
        """A new line, a call where it is `told`: the one before is over. One that goes on stays as it is."""
        assert event.agent is not None
        if (line := self.under_way(event)) is not None and line.told == told:
            return
        before = self._newest.get(event.agent)
        late = before is not None and _is_older(event.input_stamp, before.started.input_stamp)
        if before is not None and before.open and not late:
            yield from self._end(before)
        line = Line(event, shell_pid, told, event.id, event.pid or 0)
        self._of[event.id] = line
        if not late:
            self._newest[event.agent] = line
        past = self._past.setdefault(event.agent, {})
        past[event.input_stamp] = line
        if len(past) > _PAST_COUNT:
            del past[next(iter(past))]
        if told:
            yield event
        if late:  # all that it started runs in the background, and the shell has gone on
            yield from self._end(line)

    def tell(self, record: ToolCallId) -> tuple[Event, ...] | None:
        """The line that began with this program is a call after all: what follows its start. None: it is not known."""
        line = self._of.get(record)
        if line is None or line.call != record:
            return None
        line.told = True
        return () if line.open else self._ends_of(line)

    def add(self, event: ToolCallStarted, line: Line) -> Iterator[Event]:
        """One more program of a call's line. One that has ended meanwhile stays in the record that the kernel made.

        Of a line that is over it is something that this left behind; nobody's, where the call is no longer remembered.
        """
        line.parts.add(event.id)
        self._of[event.id] = line
        if line.open:
            line.last, line.exit = event.id, None
            yield from self._named_by(event, line)
        # The state hears of a call at the loop's next turn, and forgets it some time after its end.
        lately = line.open or self._now_ns() - line.over_ns < _LATELY_NS
        call = self._state.tool_calls.get(line.call, line.started if lately else None)
        if call is None or not self._take_in(event, line, call.soft_bytes, call.hard_bytes):
            self._records.exempt(event.id)
            return
        self._of[line.call] = line
        line.alive = True
        if line.open:
            line.last = line.call
        yield ToolCallJoined(event.at_ns, line.call, event.pid or 0)

    def _take_in(self, event: ToolCallStarted, line: Line, soft_bytes: int, hard_bytes: int) -> bool:
        """Into the call's record, or another one of the same id. False: it has ended meanwhile."""
        assert self._probes is not None and event.pid is not None
        usage = self._probes.usage(line.call)
        try:
            if usage is not None and usage.process_count:
                self._probes.adopt(event.pid, line.call, as_root=line.open)
            else:
                self._probes.begin_tool(
                    event.pid, event.sandbox, tag=line.call, soft_bytes=soft_bytes, hard_bytes=hard_bytes
                )
        except (LookupError, ProcessLookupError, EbpfError):
            return False
        return True

    def _named_by(self, event: ToolCallStarted, line: Line) -> Iterator[Event]:
        """A pipeline's programs exec in any order: it is known by the one that was forked first."""
        first = line.first_pid
        together = line.started.call_id is None and not line.one_ended
        if together and event.pid is not None and first - _PIPELINE < event.pid < first:
            line.first_pid = event.pid
            yield ToolCallAttributed(event.at_ns, line.call, event.source, line.started.confidence, event.command)

    def sift(self, event: Event) -> Iterable[Event] | None:
        """What the loop shall hear instead; None: it is of no call's line."""
        line = self._of.get(event.id) if isinstance(event, _OF_CALLS) else None
        if line is None:
            return None
        match event:
            case ToolCallEnded():
                line.peak_bytes, line.one_ended = max(line.peak_bytes, event.peak_bytes or 0), True
                if line.open and event.id == line.last:
                    line.exit = event
                told: Iterable[Event] = self._look(line) if line.open else ()
            case ProcessesGone():
                told = self._gone(event, line)
            case ToolCallMemoryStepped() | BudgetReached():
                told = (replace(event, id=line.call),)
        return told if line.told else None

    def _gone(self, event: ProcessesGone, line: Line) -> Iterable[Event]:
        if event.id != line.call:
            self._forget(event.id)
            return ()
        usage = self._probes.usage(line.call) if self._probes is not None else None
        if usage is not None and usage.process_count:
            return ()  # another program is in it since
        line.alive = False
        if line.open:
            return self._look(line)
        if line.told:
            self._forget(line.call)
        return (event,)

    def _forget(self, record: ToolCallId) -> None:
        line = self._of.pop(record)
        line.parts.discard(record)

    def at_turn(self) -> Iterator[Event]:
        now_ns = self._now_ns()
        if now_ns - self._looked_ns < _LOOK_NS:
            return
        self._looked_ns = now_ns
        for line in [line for line in self._newest.values() if line.open]:
            yield from self._look(line)

    def _look(self, line: Line) -> Iterable[Event]:
        """Ends it where its shell waits for input, or is gone."""
        waits = evidence.waits_for_input(line.shell_pid)
        if waits is None:  # gone, or nothing tells
            waits = processes.identify(line.shell_pid) is None or not line.alive
        now_ns = self._now_ns()
        if not waits:
            line.over_ns = 0
            return ()
        line.over_ns = line.over_ns or now_ns
        # What the line put in the background may be a fork of the shell yet, and no program.
        return () if self._forks(line) and now_ns - line.over_ns < _LOOK_NS else self._end(line)

    def _forks(self, line: Line) -> bool:
        assert self._probes is not None and line.started.agent is not None
        usage = self._probes.usage(line.started.agent)
        return usage is not None and usage.process_count > 1

    def _end(self, line: Line) -> tuple[Event, ...]:
        line.open, line.over_ns = False, line.over_ns or self._now_ns()
        ends = self._ends_of(line) if line.told else ()
        if not line.alive and line.told:
            self._forget(line.call)
        return ends

    def _ends_of(self, line: Line) -> tuple[Event, ...]:
        assert self._probes is not None
        usage = self._probes.usage(line.call)
        ended = line.exit
        told = ToolCallEnded(
            at_ns=ended.at_ns if ended is not None and not ended.escaped_count else line.over_ns,
            id=line.call,
            exit_code=ended.exit_code if ended is not None else None,
            signal=ended.signal if ended is not None else None,
            escaped_count=usage.process_count if usage is not None else 0,
            peak_bytes=line.peak_bytes or None,
        )
        return (told,) if line.alive else (told, ProcessesGone(line.over_ns, line.call))

    def shell_gone(self, shell: ToolCallId) -> Iterator[Event]:
        """Its line is over. Safe for what is no shell."""
        line = self._newest.pop(shell, None)
        self._past.pop(shell, None)
        if line is not None and line.open:
            yield from self._end(line)


def _is_older(stamp: int, than: int) -> bool:
    """Whether it was given to the shell before: both count up, in 31 bits."""
    return 0 < (than - stamp) % (1 << 31) < 1 << 30
