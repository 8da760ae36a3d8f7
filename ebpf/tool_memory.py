"""Tool calls as the daemon handles them: tag, budget, stop, resume, kill, read.

Owns the slots of the `tools` array, the records' user-side fields and the heartbeat. It decides nothing: no budget and
no signal comes from here by itself. Reads of usage are plain loads from memory shared with the kernel, without a system
call. Every method may be called at any time from one thread; a process that is gone is an outcome, not an error.
Long for being the daemon's one handle on the kernel side: its parts would share every field.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from ..policies.events import Event, ProcessesGone, ToolCallEnded, ToolCallStarted
from ..policies.model import CgroupId, ToolCallId, ToolCallSource
from .abi import Record, Role, ToolFlag
from .errors import EbpfError, UnknownTag
from .libbpf import BpfMap, monotonic_ns
from .missed import MissedExits
from .probes import Probes
from .reader import EventReader

_SIGNAL_IN_FLIGHT_S = 0.05
"""Longest wait for a stop signal that is being sent: the bracket is a few hundred instructions on another CPU."""


@dataclass(frozen=True, slots=True)
class ToolUsage:
    """One reading. Bytes; `memcg_*` only where the tool call has a memory cgroup of its own, as last sampled."""

    used_bytes: int
    peak_bytes: int
    private_bytes: int
    shared_bytes: int
    memcg_bytes: int | None
    memcg_peak_bytes: int | None
    soft_bytes: int
    hard_bytes: int
    process_count: int
    stop_count: int
    stalled_since_ns: int | None
    """When the kernel stopped it at its present hard budget; None: it was not, or it was resumed."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What the kernel side could not do, counted since load."""

    events: tuple[tuple[str, int], ...]
    """By event kind, ring full."""
    untracked: tuple[tuple[str, int], ...]
    """Processes and tool calls that could not be followed, by reason."""
    stops_withheld_count: int
    """Charges above a hard budget while the heartbeat was stale."""

    @property
    def events_count(self) -> int:
        return sum(count for _, count in self.events)


class ToolMemory:
    """The daemon's handle on the loaded probes."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self.report = probes.report
        maps, self._layouts = probes.object.maps, probes.layouts
        self._processes, self._free = maps["processes"], maps["free_slots"]
        self._retag_request, self._retag = maps["retag"], probes.object.programs["retag_process"]
        self._tools = _shared_array(maps["tools"], self._layouts.struct("tool_record"))
        self._control = _shared_array(maps["control"], self._layouts.struct("control"))[0]
        self._process_record = self._layouts.struct("process_record")
        self._reasons = self._layouts.numbers("untracked_reason", "UNTRACKED_")
        for slot in range(len(self._tools)):
            self._free.update(None, ctypes.c_uint32(slot))
        self._slots: dict[int, int] = {}
        self._gone: list[tuple[int, int]] = []
        self._ended: set[int] = set()
        """Tags whose root has exited while processes are left."""
        self._last_tag = 0
        self._missed = MissedExits(probes.object, self._layouts)
        self.reader = EventReader(
            self._layouts,
            maps["events"],
            record_of=self._tools.__getitem__,
            lost_count=lambda: self.losses().events_count,
            on_found=self._slots.__setitem__,
            on_gone=self._on_gone,
        )

    # --- life -----------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say that somebody listens. Without it the kernel side stops nobody after Tuning.heartbeat_timeout_ns."""
        self._control.heartbeat_ns = monotonic_ns()

    def fileno(self) -> int:
        """Readable when events wait."""
        return self.reader.fileno()

    def drain(self) -> list[Event]:
        """Every event since the last call; then gives back the records of tool calls that are gone."""
        events = self.reader.drain()
        self._ended.update(event.id for event in events if isinstance(event, ToolCallEnded))
        gone, self._gone = self._gone, []
        for tag, slot in gone:
            self._release(tag, slot)
        if self._missed.due(monotonic_ns()):
            events += self.bury()
        return events

    def bury(self) -> list[Event]:
        """Takes processes whose exit the kernel side missed out of the books; tool calls that this ends end in the next
        drain(). drain() calls it when it may be needed.
        """
        events: list[Event] = []
        for process in self._missed.bury():
            record = self._tools[process.slot]
            if record.tag == process.tag and record.root_tgid == process.tgid and record.role == Role.TOOL:
                tag, peak_bytes = ToolCallId(process.tag), record.peak_bytes
                self._ended.add(tag)
                events.append(ToolCallEnded(monotonic_ns(), tag, None, None, peak_bytes=peak_bytes))
        return events

    def resync(self) -> list[Event]:
        """Events for what happened while events were lost: tool calls never heard of, tool calls that ended unseen.

        Walks all records; call it after a drain() that returned EventsLost, not at every tick.
        """
        events: list[Event] = []
        now_ns = monotonic_ns()
        for slot, record in enumerate(self._tools):
            tag = record.tag
            if not tag or record.role != Role.TOOL:
                continue
            if tag not in self._slots and record.processes:
                self._slots[tag] = slot
                events.append(_found(record))
            elif tag in self._slots and not record.processes and record.root_tgid:
                if tag not in self._ended:
                    peak_bytes = record.peak_bytes
                    events.append(ToolCallEnded(now_ns, ToolCallId(tag), None, None, peak_bytes=peak_bytes))
                events.append(ProcessesGone(now_ns, ToolCallId(tag)))
                self._release(tag, slot)
        return events

    def close(self) -> None:
        """Stop reading and detach; afterwards nobody is stopped, and whoever is stopped stays so: resume() first."""
        self._control.heartbeat_ns = 0
        self._slots.clear()
        self.reader.close()
        self._probes.close()

    # --- tagging ---------------------------------------------------------------------------------------------------

    def new_tag(self) -> ToolCallId:
        """A tag that no other tool call of this boot carries: positive, fits a signed 64-bit integer."""
        self._last_tag += 1
        return ToolCallId(self._probes.tag_epoch << 32 | 1 << 31 | self._last_tag)

    def register_agent(
        self, pid: int, sandbox: CgroupId, *, soft_bytes: int = 0, hard_bytes: int = 0, starting: bool = False
    ) -> ToolCallId:
        """Follow an agent: the process `pid`, whatever it execs itself, its threads and its forks that do not exec.

        Every exec by such a fork becomes a tool call of `sandbox`, with the two budgets (0: none) to begin with.
        `starting`: what is found below it is `starting` too, see set_starting().
        Returns the agent's own tag; usage(tag) is its runtime's memory. Raises ProcessLookupError when pid is gone.
        """
        return self._begin(
            self.new_tag(),
            sandbox,
            Role.AGENT,
            pid,
            child_soft_bytes=soft_bytes,
            child_hard_bytes=hard_bytes,
            flags=ToolFlag.STARTING if starting else 0,
        )

    def begin_tool(
        self,
        pid: int,
        sandbox: CgroupId,
        *,
        tag: ToolCallId | None = None,
        soft_bytes: int = 0,
        hard_bytes: int = 0,
        own_memcg: bool = False,
    ) -> ToolCallId:
        """Make the process `pid` (with all its threads; not its existing children) the root of a tool call.

        Memory that it holds already counts from now on. Raises ProcessLookupError when pid is gone.
        """
        flags = ToolFlag.OWN_MEMCG if own_memcg else 0
        return self._begin(
            tag or self.new_tag(),
            sandbox,
            Role.TOOL,
            pid,
            soft_bytes=soft_bytes,
            hard_bytes=hard_bytes,
            flags=flags,
        )

    def adopt(self, pid: int, tag: ToolCallId) -> None:
        """Add a running process to an existing tool call or agent. Raises UnknownTag, ProcessLookupError."""
        slot = self._slot(tag)
        self._tag_process(pid, tag, slot, Role(self._tools[slot].role))

    def forget(self, tag: ToolCallId) -> None:
        """Give back the record of an agent or tool call whose processes are no longer of interest. Safe to repeat."""
        if (slot := self._slots.get(tag)) is not None:
            self._release(tag, slot)

    def _begin(self, tag: ToolCallId, sandbox: CgroupId, role: Role, pid: int, **fields: int) -> ToolCallId:
        slot = ctypes.c_uint32()
        if not self._free.pop(slot):
            raise EbpfError(f"all {len(self._tools)} tool records are in use: raise Tuning.tool_slots")
        record = self._tools[slot.value]
        ctypes.memset(ctypes.addressof(record), 0, ctypes.sizeof(record))
        record.sandbox_id, record.role, record.root_tgid = sandbox, role, pid
        record.started_ns = monotonic_ns()
        for name, value in fields.items():
            setattr(record, name, value)
        record.tag = tag  # last: from here on the kernel accepts the record
        self._slots[tag] = slot.value
        try:
            self._tag_process(pid, tag, slot.value, role)
        except BaseException:
            self._release(tag, slot.value)
            raise
        return tag

    def _tag_process(self, pid: int, tag: int, slot: int, role: Role) -> None:
        zero = ctypes.c_uint32(0)
        request: Any = self._layouts.struct("retag_request")(tag=tag, slot=slot, role=role, tgid=pid)
        self._retag_request.update(zero, request)
        self._retag.run_over_tasks(pid)
        self._retag_request.lookup(zero, request)
        if request.failed_tasks:
            raise EbpfError(f"the kernel refused task storage for {request.failed_tasks} threads of pid {pid}")
        if not request.tagged_tasks:
            raise ProcessLookupError(f"no process {pid}")

    # --- reading ---------------------------------------------------------------------------------------------------

    def usage(self, tag: ToolCallId) -> ToolUsage | None:
        """The present state of a tool call or agent; None when it is gone or unknown."""
        slot = self._slots.get(tag)
        if slot is None:
            return None
        record = self._tools[slot]
        if record.tag != tag:
            return None
        own_memcg = bool(record.flags & ToolFlag.OWN_MEMCG)
        return ToolUsage(
            used_bytes=record.usage_bytes,
            peak_bytes=record.peak_bytes,
            private_bytes=max(0, record.private_bytes),
            shared_bytes=max(0, record.shared_bytes),
            memcg_bytes=record.memcg_bytes if own_memcg else None,
            memcg_peak_bytes=record.memcg_peak_bytes if own_memcg else None,
            soft_bytes=record.soft_bytes,
            hard_bytes=record.hard_bytes,
            process_count=record.processes,
            stop_count=record.stops_finished,
            stalled_since_ns=record.stalled_since_ns or None,
        )

    def tags(self) -> tuple[ToolCallId, ...]:
        """Of the tool calls and agents known here."""
        return tuple(ToolCallId(tag) for tag in self._slots)

    def processes(self, tag: ToolCallId) -> tuple[int, ...]:
        """Pids of a tool call's living processes, escapees included. Walks all followed processes."""
        found: list[int] = []
        record: Any = self._process_record()
        for key in self._processes.keys(ctypes.c_uint32):
            if self._processes.lookup(key, record) and record.tag == tag:
                found.append(key.value)
        return tuple(dict.fromkeys(found))

    def tag_of(self, pid: int) -> ToolCallId | None:
        """The tool call or agent that a process belongs to; None when it is not followed."""
        record: Any = self._process_record()
        return ToolCallId(record.tag) if self._processes.lookup(ctypes.c_uint32(pid), record) else None

    def followed_count(self) -> tuple[int, int]:
        """Processes and address spaces in the books; (0, 0) when nothing is followed."""
        mms = self._probes.object.maps["mms"]
        return sum(1 for _ in self._processes.keys(ctypes.c_uint32)), sum(1 for _ in mms.keys(ctypes.c_uint64))

    def losses(self) -> Losses:
        lost, untracked = self._control.lost, self._control.untracked
        return Losses(
            events=tuple((kind.name.lower(), lost[kind.number]) for kind in self._layouts.event_kinds),
            untracked=tuple((name.lower(), untracked[reason]) for name, reason in self._reasons.items()),
            stops_withheld_count=self._control.stops_withheld,
        )

    # --- budgets and signals ---------------------------------------------------------------------------------------

    def set_budget(self, tag: ToolCallId, *, soft_bytes: int, hard_bytes: int) -> None:
        """0: none. Takes effect at the next page; continues nobody (see resume). Raises UnknownTag."""
        record = self._tools[self._slot(tag)]
        record.soft_bytes, record.hard_bytes = soft_bytes, hard_bytes

    def set_child_budget(self, agent: ToolCallId, *, soft_bytes: int, hard_bytes: int) -> None:
        """Budgets that the agent's next tool calls begin with. Raises UnknownTag."""
        record = self._tools[self._slot(agent)]
        record.child_soft_bytes, record.child_hard_bytes = soft_bytes, hard_bytes

    def set_own_memcg(self, tag: ToolCallId, own: bool) -> None:
        """Whether its processes, and no others, are in one memory cgroup now. Raises UnknownTag."""
        self._set_flag(tag, ToolFlag.OWN_MEMCG, own)

    def set_starting(self, tag: ToolCallId, starting: bool) -> None:
        """Whether it may become the agent yet: every exec below it has a record of its own then. Raises UnknownTag."""
        self._set_flag(tag, ToolFlag.STARTING, starting)

    def _set_flag(self, tag: ToolCallId, flag: int, on: bool) -> None:
        record = self._tools[self._slot(tag)]
        record.flags = record.flags | flag if on else record.flags & ~flag

    def resume(self, tag: ToolCallId) -> int:
        """Continue every process of a tool call; returns how many. Raise the budget first, or it stops again.

        A stop that the kernel is sending at this moment is waited for and continued too. Raises UnknownTag.
        """
        record = self._tools[self._slot(tag)]
        deadline = time.monotonic() + _SIGNAL_IN_FLIGHT_S
        while True:
            while record.stops_started != record.stops_finished and time.monotonic() < deadline:
                time.sleep(0)
            seen = record.stops_started
            record.stalled_since_ns = 0
            record.hard_reported_bytes = 0
            continued = self._send(tag, signal.SIGCONT)
            over = record.hard_bytes and record.usage_bytes > record.hard_bytes
            if record.stops_started == seen or over or time.monotonic() >= deadline:
                return continued

    def stop(self, tag: ToolCallId) -> int:
        """SIGSTOP to every process of it; returns how many. For hosts without a cgroup to freeze."""
        return self._send(tag, signal.SIGSTOP)

    def kill(self, tag: ToolCallId, rounds: int = 10) -> int:
        """SIGKILL to every process of it, again until none is left that can fork; returns how many were signalled."""
        killed = 0
        for _ in range(rounds):
            sent = self._send(tag, signal.SIGKILL)
            killed += sent
            if not sent:
                break
            time.sleep(0.001)
        return killed

    def _send(self, tag: int, number: signal.Signals) -> int:
        sent = 0
        for pid in self.processes(ToolCallId(tag)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
            sent += 1
        return sent

    # --- slots -----------------------------------------------------------------------------------------------------

    def _slot(self, tag: int) -> int:
        slot = self._slots.get(tag)
        if slot is None or self._tools[slot].tag != tag:
            raise UnknownTag(tag)
        return slot

    def _on_gone(self, tag: int, slot: int) -> None:
        self._gone.append((tag, slot))

    def _release(self, tag: int, slot: int) -> None:
        self._slots.pop(tag, None)
        self._ended.discard(tag)
        record = self._tools[slot]
        if record.tag == tag:
            record.tag = 0
            self._free.update(None, ctypes.c_uint32(slot))


def _shared_array(a_map: BpfMap, element: type[Record]) -> Any:
    """The map's elements, shared with the kernel. Array elements are padded to 8 bytes; ours already are."""
    return (element * a_map.max_entries).from_buffer(a_map.map_memory(ctypes.sizeof(element)))


def _found(record: Any) -> ToolCallStarted:
    """A tool call whose beginning was lost: everything but its words."""
    return ToolCallStarted(
        at_ns=record.started_ns,
        id=ToolCallId(record.tag),
        sandbox=CgroupId(record.sandbox_id),
        command=_command_line(record.root_tgid),
        source=ToolCallSource.LINEAGE,
        confidence=0.5,
        pid=record.root_tgid,
        soft_bytes=record.soft_bytes,
        hard_bytes=record.hard_bytes,
        agent=ToolCallId(record.agent_tag) if record.agent_tag else None,
    )


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
