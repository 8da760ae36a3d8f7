"""Finds again what events did not tell: the ring was full, or there was no record left.

Owns the comparing of the kernel's books, which lose nothing of what they could hold, with what user space was told, and
when to compare. A look changes nothing that one look alone has seen: what is found at two looks in a row, with all
events read in between, is so, and was not merely under way. Must not emit: it answers events, ToolMemory hands them on.
"""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..policies.events import (
    BudgetLevel,
    BudgetReached,
    Event,
    ProcessesGone,
    ProcessExeced,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from ..policies.model import CgroupId, ToolCallId, ToolCallSource
from .abi import Record, Role
from .libbpf import BpfMap

LOOK_AGAIN_NS = 250_000_000
"""Between two looks: longer than any event is under way from the books to the ring."""
LOOKS_AFTER_A_LOSS = 3
UNRECORDED_EVERY_NS = 1_000_000_000
"""While calls without a record live: a record may have come free."""
FOUND_CONFIDENCE = 0.5
"""Of a call whose beginning was not told."""

Processes = dict[int, list[tuple[int, Any]]]
"""Pids with what the kernel keeps of each."""


@dataclass(slots=True)
class Books:
    """What user space was told, by tag."""

    slots: dict[int, int] = field(default_factory=dict)
    """Records in use."""
    ended: set[int] = field(default_factory=set)
    """Tool calls whose root has exited while processes are left."""
    stopped: dict[int, int] = field(default_factory=dict)
    """The hard budget that each has reached, bytes."""

    def forget(self, tag: int) -> None:
        self.slots.pop(tag, None)
        self.ended.discard(tag)
        self.stopped.pop(tag, None)


class Resync:
    """`due()` says when to look, `look()` looks."""

    def __init__(
        self,
        tools: Any,
        process_record: type[Record],
        processes: BpfMap,
        books: Books,
        release: Callable[[int, int], None],
        record: Callable[[int, list[int], Any], int | None],
    ) -> None:
        """`release(tag, slot)` gives a record back. `record(root, pids, process)` makes one for processes that had none
        (`process` is what is kept of one of them) and answers its slot; None: there is no room yet.
        """
        self._tools = tools
        self._process_record = process_record
        self._processes = processes
        self._books = books
        self._release = release
        self._record = record
        self._suspects: set[tuple[str, int]] = set()
        self._seen: set[tuple[str, int]] = set()
        self._looks_left = 0
        self._next_look_ns = 0
        self.unrecorded_count = 0
        """Tool calls that ran without a record at the last look."""

    def lost(self) -> None:
        """Something was lost: look, and look again."""
        self._looks_left = LOOKS_AFTER_A_LOSS

    def due(self, now_ns: int) -> bool:
        """Whether to look now. The ring was read just before."""
        if now_ns < self._next_look_ns or not (self._looks_left or self.unrecorded_count):
            return False
        self._next_look_ns = now_ns + (LOOK_AGAIN_NS if self._looks_left else UNRECORDED_EVERY_NS)
        self._looks_left = max(0, self._looks_left - 1)
        return True

    def look(self, now_ns: int) -> list[Event]:
        """Events for what was not told, as far as the look before saw it too. Walks all records and processes."""
        self._suspects, self._seen = self._seen, set()
        members: Processes = defaultdict(list)
        unrecorded: Processes = defaultdict(list)
        for pid, process in self._processes.items(ctypes.c_uint32, self._process_record):
            (unrecorded[process.unrecorded] if process.unrecorded else members[process.tag]).append((pid, process))
        events: list[Event] = []
        for slot, record in enumerate(self._tools):
            if record.tag:
                pids = [pid for pid, _ in members.get(record.tag, ())]
                events += self._compare(slot, record, pids, now_ns)
        self.unrecorded_count = len(unrecorded)
        for root, found in unrecorded.items():
            events += self._take_in(root, found)
        return events

    def _certain(self, what: str, tag: int) -> bool:
        """Whether the look before saw it as well."""
        self._seen.add((what, tag))
        return (what, tag) in self._suspects

    def _compare(self, slot: int, record: Any, pids: list[int], now_ns: int) -> Iterator[Event]:
        tag, books = ToolCallId(record.tag), self._books
        if not record.processes:
            if self._certain("gone", tag):
                if record.role == Role.TOOL and tag in books.slots:
                    if tag not in books.ended:
                        yield ToolCallEnded(now_ns, tag, None, None, peak_bytes=record.peak_bytes)
                    yield ProcessesGone(now_ns, tag)
                self._release(tag, slot)
            return
        if record.role != Role.TOOL or not pids:
            return
        if tag not in books.slots:
            if not self._certain("begun", tag):
                return
            books.slots[tag] = slot
            yield found_call(record, record.root_tgid if record.root_tgid in pids else pids[0])
        if record.root_tgid not in pids and tag not in books.ended and self._certain("ended", tag):
            books.ended.add(tag)
            peak_bytes = record.peak_bytes
            yield ToolCallEnded(now_ns, tag, None, None, escaped_count=len(pids), peak_bytes=peak_bytes)
        yield ToolCallMemoryStepped(now_ns, tag, record.usage_bytes, record.peak_bytes)
        if record.stalled_since_ns and books.stopped.get(tag) != record.hard_bytes:
            books.stopped[tag] = record.hard_bytes
            used, hard, pid = record.usage_bytes, record.hard_bytes, pids[0]
            yield BudgetReached(record.stalled_since_ns, tag, BudgetLevel.HARD, hard, used, pid)
        if record.execs > 1 and record.root_tgid in pids and (command := command_line(record.root_tgid)):
            yield ProcessExeced(now_ns, tag, record.root_tgid, command)

    def _take_in(self, root: int, found: list[tuple[int, Any]]) -> Iterator[Event]:
        """A tool call for which there was no record when it began."""
        pids = [pid for pid, _ in found]
        if not self._certain("unrecorded", root):
            return
        first = root if root in pids else pids[0]
        slot = self._record(first, [pid for pid in pids if pid != first], found[0][1])
        if slot is not None:
            self.unrecorded_count -= 1
            yield found_call(self._tools[slot], first)


def found_call(record: Any, pid: int) -> ToolCallStarted:
    """A tool call whose beginning was not told, as /proc shows the process `pid` of it now."""
    try:
        session, group = os.getsid(pid), os.getpgid(pid)
    except ProcessLookupError:
        session = group = 0
    return ToolCallStarted(
        at_ns=record.started_ns,
        id=ToolCallId(record.tag),
        sandbox=CgroupId(record.sandbox_id),
        command=command_line(pid),
        source=ToolCallSource.LINEAGE,
        confidence=FOUND_CONFIDENCE,
        pid=pid,
        soft_bytes=record.soft_bytes,
        hard_bytes=record.hard_bytes,
        session_leader=session == pid,
        group_leader=group == pid,
        agent=ToolCallId(record.agent_tag) if record.agent_tag else None,
    )


def command_line(pid: int) -> str:
    """argv joined by blanks; "" where the process is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
