"""Command lines of persistent shells: each is one tool call, however many programs it starts one after another.

Owns which line of a shell runs, which programs are of it and when it is over. A line begins with the first program that
the shell starts after it was given new input (ToolCallStarted.input_stamp), and ends when the shell waits for the next,
with or without programs left behind. Its call is known by the record of its first program; when that has ended, the
next program is taken into a record of the same id. Rules on nothing: what a program is was said before.

A line of builtins alone starts no program and is not seen here. A subshell in the background that starts a program
after the shell was given its next line is taken for a part of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from ...ebpf.errors import EbpfError
from ...ebpf.tool_memory import ToolMemory
from ...policies.events import (
    BudgetReached,
    Event,
    ProcessesGone,
    ToolCallEnded,
    ToolCallJoined,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from ...policies.model import NS_PER_S, ToolCallId
from ...policies.state import State
from . import evidence, processes
from .records import Records

_LOOK_NS = NS_PER_S // 20
"""How often a shell is asked whether it waits for input, besides at the end of each of its programs."""
_OF_CALLS = (ToolCallEnded, ProcessesGone, ToolCallMemoryStepped, BudgetReached)


@dataclass(slots=True)
class Line:
    """One command line. Its call is the record of its first program, or another one of the same id."""

    started: ToolCallStarted
    shell_pid: int
    told: bool
    """Whether it is a call. Else its programs are looked after by whoever ruled so; it may become one (tell)."""
    last: ToolCallId
    """The record of the program that began last: its exit code is the line's."""
    parts: set[ToolCallId] = field(default_factory=set)
    """Records of later programs, as the kernel made them; most are empty by now."""
    exit: ToolCallEnded | None = None
    """Of `last`."""
    peak_bytes: int = 0
    open: bool = True
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
        self._of: dict[ToolCallId, Line] = {}
        """By the records of a line's programs."""
        self._looked_ns = 0

    def under_way(self, event: ToolCallStarted) -> Line | None:
        """The line of its shell that this program is of; None: it begins a new one."""
        line = self._newest.get(event.agent) if event.agent is not None else None
        return line if line is not None and event.input_stamp in (0, line.started.input_stamp) else None

    def begin(self, event: ToolCallStarted, shell_pid: int, *, told: bool) -> Iterator[Event]:
        """A new line, a call where it is `told`: the one before is over. One that goes on stays as it is."""
        assert event.agent is not None
        if (line := self.under_way(event)) is not None and line.told == told:
            return
        yield from self.shell_gone(event.agent)
        line = Line(event, shell_pid, told, event.id)
        self._newest[event.agent] = self._of[event.id] = line
        if told:
            yield event

    def tell(self, record: ToolCallId) -> bool:
        """The line that began with this program is a call after all; answers whether its end is still to come."""
        line = self._of.get(record)
        if line is None or not line.open:
            return False
        line.told = True
        return True

    def add(self, event: ToolCallStarted, line: Line) -> Iterator[Event]:
        """One more program of a call's line. One that has ended meanwhile stays in the record that the kernel made."""
        assert self._probes is not None and event.pid is not None
        line.parts.add(event.id)
        self._of[event.id] = line
        if not line.open:  # left behind by a line that is over
            self._records.exempt(event.id)
            return
        line.last, line.exit = event.id, None
        call = self._state.tool_calls.get(line.call, line.started)
        try:
            usage = self._probes.usage(line.call)
            if usage is not None and usage.process_count:
                self._probes.adopt(event.pid, line.call, as_root=True)
            else:
                self._probes.begin_tool(
                    event.pid,
                    event.sandbox,
                    tag=line.call,
                    soft_bytes=call.soft_bytes,
                    hard_bytes=call.hard_bytes,
                )
        except (LookupError, ProcessLookupError, EbpfError):
            return
        line.alive, line.last = True, line.call
        yield ToolCallJoined(event.at_ns, line.call, event.pid)

    def sift(self, event: Event) -> Iterable[Event] | None:
        """What the loop shall hear instead; None: it is of no call's line."""
        line = self._of.get(event.id) if isinstance(event, _OF_CALLS) else None
        if line is None:
            return None
        match event:
            case ToolCallEnded():
                line.peak_bytes = max(line.peak_bytes, event.peak_bytes or 0)
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
        return tuple(self._end(line)) if waits else ()

    def _end(self, line: Line) -> Iterator[Event]:
        assert self._probes is not None
        line.open = False
        usage = self._probes.usage(line.call)
        left = usage.process_count if usage is not None else 0
        ended = line.exit
        if line.told:
            yield ToolCallEnded(
                at_ns=ended.at_ns if ended is not None else self._now_ns(),
                id=line.call,
                exit_code=ended.exit_code if ended is not None else None,
                signal=ended.signal if ended is not None else None,
                escaped_count=left,
                peak_bytes=line.peak_bytes or None,
            )
        if not line.alive:
            self._forget(line.call)
            if line.told:
                yield ProcessesGone(self._now_ns(), line.call)

    def shell_gone(self, shell: ToolCallId) -> Iterator[Event]:
        """Its line is over. Safe for what is no shell."""
        line = self._newest.pop(shell, None)
        if line is not None and line.open:
            yield from self._end(line)
