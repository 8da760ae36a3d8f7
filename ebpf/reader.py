"""Turns ring-buffer records into `policies.events`.

Owns which event a kind of record is, and nothing that lasts: which tool calls exist is ToolMemory's. A kind that is not
named here is the event called like it, its fields paired by name (translation.py). One thread: the event loop watches
`fileno()` and calls `drain()`; the daemon's tick calls it as well, since memory steps wake nobody.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, get_args

from ..policies.events import (
    BudgetLevel,
    BudgetReached,
    ConnectionOpened,
    Event,
    EventsLost,
    ProcessesGone,
    ProcessExeced,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from ..policies.model import ToolCallSource
from .abi import EventKind, Layouts, Record, Role
from .errors import AbiMismatch
from .libbpf import READ_AT_ONCE, BpfMap, RingBuffer, monotonic_ns
from .translation import Translation

LINEAGE_CONFIDENCE = 0.9
"""An agent's fork exec'd: a tool call, unless it is a helper that the agent keeps for itself (a language server)."""

_NO_BUDGETS = SimpleNamespace(soft_bytes=0, hard_bytes=0)

_Pair = Callable[[type[Record]], Translation]


class EventReader:
    """Reads one ring. `lost()` is the kernel's running count of what it could not tell or follow, by source."""

    def __init__(
        self,
        layouts: Layouts,
        ring: BpfMap,
        record_of: Callable[[int], Any],
        lost: Callable[[], Mapping[str, int]],
        on_found: Callable[[int, int], None],
        on_gone: Callable[[int, int], None],
    ) -> None:
        """`record_of(slot)` is the live record.

        `on_found(tag, slot)` is told of a tool call found by exec, `on_gone(tag, slot)` when the last process of a tag
        has exited. Raises AbiMismatch where a kind of record is no event.
        """
        self._kinds = {
            kind.number: (kind.name, translation)
            for kind, translation in zip(layouts.event_kinds, translations(layouts, record_of), strict=True)
        }
        self._ring = RingBuffer(ring, self._decode)
        self._lost = lost
        self._lost_reported: Mapping[str, int] = {}
        self._on_found = on_found
        self._on_gone = on_gone
        self._events: list[Event] = []
        self.emptied = True
        """Whether the latest drain() read everything."""

    def fileno(self) -> int:
        """For loop.add_reader()."""
        return self._ring.fileno()

    def drain(self) -> list[Event]:
        """The events since the last call, in the kernel's order; of very many a part. Never blocks."""
        self.emptied = self._ring.consume() < READ_AT_ONCE
        events, self._events = self._events, []
        lost = self._lost()
        if lost != self._lost_reported:
            more = {source: count - self._lost_reported.get(source, 0) for source, count in lost.items()}
            events += [EventsLost(monotonic_ns(), source, count) for source, count in more.items() if count]
            self._lost_reported = lost
        return events

    def close(self) -> None:
        self._ring.close()

    def _decode(self, data: bytes) -> None:
        name, translation = self._kinds[int.from_bytes(data[:4], sys.byteorder)]  # the header's first field
        record: Any = translation.record.from_buffer_copy(data)
        header = record.header
        if name == "TOOL_GONE":
            # Even for an agent: its record can be given to another.
            self._on_gone(header.tag, header.slot)
        if header.role != Role.TOOL and not translation.of_agents:
            return  # what becomes of an agent is seen by whoever registered it
        if name == "TOOL_EXEC":
            self._on_found(header.tag, header.slot)
        self._events.append(translation.decode(record))


def translations(layouts: Layouts, record_of: Callable[[int], Any]) -> list[Translation]:
    """How the records of each of the object's kinds become events, in the kinds' order. Raises AbiMismatch."""
    named = _named(record_of)
    return [_translation(layouts, kind, named.get(kind.name)) for kind in layouts.event_kinds]


def _translation(layouts: Layouts, kind: EventKind, pair: _Pair | None) -> Translation:
    try:
        return pair(kind.record) if pair is not None else Translation(_class_of(kind.name), kind.record)
    except TypeError as error:
        raise AbiMismatch(layouts.path, f"EVENT_{kind.name}: {error}") from error


def _class_of(name: str) -> type:
    """PROCESS_STARTED: ProcessStarted."""
    wanted = "".join(word.capitalize() for word in name.split("_"))
    found: type | None = next((each for each in get_args(Event) if each.__name__ == wanted), None)
    if found is None:
        raise TypeError(f"policies/events.py has no {wanted}")
    return found


def _named(record_of: Callable[[int], Any]) -> dict[str, _Pair]:
    """The kinds whose event is called otherwise, or takes more than their fields."""

    def part(kind: type, **ways: Any) -> _Pair:
        return lambda record: Translation(kind, record, whole=False, **ways)

    def reached(level: BudgetLevel) -> _Pair:
        return part(BudgetReached, renamed={"used_bytes": "usage_bytes"}, given={"level": lambda _: level})

    def budgets(event: Any) -> Any:
        record = record_of(event.header.slot)
        return record if record.tag == event.header.tag else _NO_BUDGETS

    return {
        "TOOL_EXEC": part(
            ToolCallStarted,
            given={
                "command": command_of,
                "source": lambda _: ToolCallSource.LINEAGE,
                "confidence": lambda _: LINEAGE_CONFIDENCE,
                "soft_bytes": lambda event: budgets(event).soft_bytes,
                "hard_bytes": lambda event: budgets(event).hard_bytes,
                "session_leader": lambda event: event.session_id == event.header.tgid,
                "group_leader": lambda event: event.group_id == event.header.tgid,
            },
            here=("session", "call_id", "exempt", "earlier"),
        ),
        "CHILD_EXEC": part(ProcessExeced, given={"command": command_of}),
        "MEMORY": part(ToolCallMemoryStepped, renamed={"used_bytes": "usage_bytes"}),
        "SOFT_BUDGET": reached(BudgetLevel.SOFT),
        "HARD_BUDGET": reached(BudgetLevel.HARD),
        "TOOL_EXIT": part(
            ToolCallEnded,
            renamed={"escaped_count": "processes", "signal": "exit_signal"},
            given={"exit_code": lambda event: None if event.exit_signal else event.exit_code},
        ),
        "TOOL_GONE": part(ProcessesGone),
        "CONNECTION": part(ConnectionOpened),
    }


def command_of(event: Any) -> str:
    """argv of an exec's record joined by blanks, an ellipsis where the kernel cut it short; else the file's name."""
    raw = ctypes.string_at(ctypes.addressof(event) + type(event).argv.offset, event.argv_bytes)
    words = [word.decode(errors="replace") for word in raw.rstrip(b"\0").split(b"\0")]
    text = " ".join(words).strip()
    if not text:
        return bytes(event.filename).decode(errors="replace")
    return text + ("…" if event.argv_total_bytes > event.argv_bytes else "")
