"""Turns ring-buffer records into `policies.events`.

Owns the decoding of records, and nothing that lasts: which tool calls exist is ToolMemory's. One thread: the event
loop watches `fileno()` and calls `drain()`; the daemon's tick calls it as well, since memory steps wake nobody.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ipaddress import IPv6Address
from typing import TypeVar

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
from ..policies.model import CgroupId, ToolCallId, ToolCallSource
from .abi import ConnectionEvent, EventHeader, EventKind, ExecEvent, ExitEvent, MemoryEvent, Role, ToolRecord
from .libbpf import BpfMap, RingBuffer, monotonic_ns

LINEAGE_CONFIDENCE = 0.9
"""An agent's fork exec'd: a tool call, unless it is a helper that the agent keeps for itself (a language server)."""

Record = TypeVar("Record", bound=ctypes.Structure)


class EventReader:
    """Reads one ring. `lost()` is the kernel's running count of what it could not tell or follow, by source."""

    def __init__(
        self,
        ring: BpfMap,
        record_of: Callable[[int], ToolRecord],
        lost: Callable[[], Mapping[str, int]],
        on_found: Callable[[int, int], None],
        on_gone: Callable[[int, int], None],
    ) -> None:
        """`record_of(slot)` is the live record.

        `on_found(tag, slot)` is told of a tool call found by exec, `on_gone(tag, slot)` when the last process of a tag
        has exited.
        """
        self._ring = RingBuffer(ring, self._decode)
        self._record_of = record_of
        self._lost = lost
        self._lost_reported: Mapping[str, int] = {}
        self._on_found = on_found
        self._on_gone = on_gone
        self._events: list[Event] = []

    def fileno(self) -> int:
        """For loop.add_reader()."""
        return self._ring.fileno()

    def drain(self) -> list[Event]:
        """Every event since the last call, in the kernel's order. Never blocks."""
        self._ring.consume()
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
        header = _read(EventHeader, data)
        kind, is_tool = EventKind(header.kind), header.role == Role.TOOL
        if kind is EventKind.TOOL_GONE:
            # Even for an agent: its record can be given to another.
            self._on_gone(header.tag, header.slot)
        if kind is EventKind.CONNECTION:
            # Of an agent too: its runtime is what talks to the engine.
            self._events.append(_connection(_read(ConnectionEvent, data), is_agent=not is_tool))
        if not is_tool:
            return  # what becomes of an agent is seen by whoever registered it
        match kind:
            case EventKind.TOOL_EXEC:
                self._on_found(header.tag, header.slot)
                self._events.append(self._started(_read(ExecEvent, data)))
            case EventKind.CHILD_EXEC:
                command = command_of(_read(ExecEvent, data))
                self._events.append(ProcessExeced(header.time_ns, ToolCallId(header.tag), header.tgid, command))
            case EventKind.MEMORY:
                step = _read(MemoryEvent, data)
                self._events.append(
                    ToolCallMemoryStepped(header.time_ns, ToolCallId(header.tag), step.usage_bytes, step.peak_bytes)
                )
            case EventKind.SOFT_BUDGET | EventKind.HARD_BUDGET:
                level = BudgetLevel.SOFT if kind is EventKind.SOFT_BUDGET else BudgetLevel.HARD
                step = _read(MemoryEvent, data)
                self._events.append(
                    BudgetReached(
                        at_ns=header.time_ns,
                        id=ToolCallId(header.tag),
                        level=level,
                        budget_bytes=step.budget_bytes,
                        used_bytes=step.usage_bytes,
                        pid=header.tgid,
                    )
                )
            case EventKind.TOOL_EXIT:
                self._events.append(_ended(_read(ExitEvent, data)))
            case EventKind.CONNECTION:
                pass  # reported above
            case EventKind.TOOL_GONE:
                self._events.append(ProcessesGone(header.time_ns, ToolCallId(header.tag)))

    def _started(self, event: ExecEvent) -> ToolCallStarted:
        header = event.header
        record = self._record_of(header.slot)
        known = record.tag == header.tag
        return ToolCallStarted(
            at_ns=header.time_ns,
            id=ToolCallId(header.tag),
            sandbox=CgroupId(header.sandbox_id),
            command=command_of(event),
            source=ToolCallSource.LINEAGE,
            confidence=LINEAGE_CONFIDENCE,
            pid=header.tgid,
            soft_bytes=record.soft_bytes if known else 0,
            hard_bytes=record.hard_bytes if known else 0,
            agent=ToolCallId(header.agent_tag) if header.agent_tag else None,
            session_leader=event.session_id == header.tgid,
            group_leader=event.group_id == header.tgid,
            input_stamp=event.input_stamp,
        )


def _connection(event: ConnectionEvent, *, is_agent: bool) -> ConnectionOpened:
    header = event.header
    return ConnectionOpened(
        at_ns=header.time_ns,
        sandbox=CgroupId(header.sandbox_id),
        id=ToolCallId(header.tag),
        pid=header.tgid,
        is_agent=is_agent,
        local_address=address_text(bytes(event.local_address)),
        local_port=event.local_port,
        remote_address=address_text(bytes(event.remote_address)),
        remote_port=event.remote_port,
        network_namespace=event.network_namespace,
    )


def address_text(packed: bytes) -> str:
    """16 bytes as people write them: an IPv4 address in dotted form, also where a socket of both families holds it."""
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _ended(event: ExitEvent) -> ToolCallEnded:
    killed = event.exit_signal != 0
    return ToolCallEnded(
        at_ns=event.header.time_ns,
        id=ToolCallId(event.header.tag),
        exit_code=None if killed else event.exit_code,
        signal=event.exit_signal if killed else None,
        escaped_count=event.processes,
        peak_bytes=event.peak_bytes,
        memcg_peak_bytes=event.memcg_peak_bytes or None,
    )


def command_of(event: ExecEvent) -> str:
    """argv joined by blanks, cut short with an ellipsis where the kernel's copy was; else the file's name."""
    raw = ctypes.string_at(ctypes.addressof(event) + ExecEvent.argv.offset, event.argv_bytes)
    words = [word.decode(errors="replace") for word in raw.rstrip(b"\0").split(b"\0")]
    text = " ".join(words).strip()
    if not text:
        return bytes(event.filename).decode(errors="replace")
    return text + ("…" if event.argv_total_bytes > event.argv_bytes else "")


def _read(record: type[Record], data: bytes) -> Record:
    return record.from_buffer_copy(data)
