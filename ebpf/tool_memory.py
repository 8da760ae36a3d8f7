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

from ..policies.events import BudgetLevel, BudgetReached, Event, EventsLost, ToolCallEnded
from ..policies.model import CgroupId, ToolCallId
from .abi import Record, Role, ToolFlag
from .errors import EbpfError, UnknownTag
from .libbpf import BpfMap, monotonic_ns
from .missed import MissedExits
from .probes import Probes
from .reader import EventReader
from .resync import Books, Resync

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

    def by_source(self) -> dict[str, int]:
        """Everything that was lost, under one name each; what is zero is left out."""
        named = [(f"ring buffer: {kind}", count) for kind, count in self.events]
        named += [(f"not followed: {reason}", count) for reason, count in self.untracked]
        return {name: count for name, count in named if count}


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
        self._books = Books()
        self._gone: list[tuple[int, int]] = []
        self._last_tag = 0
        self._missed = MissedExits(probes.object, self._layouts)
        self.reader = EventReader(
            self._layouts,
            maps["events"],
            record_of=self._tools.__getitem__,
            lost=lambda: self.losses().by_source(),
            on_found=self._books.slots.__setitem__,
            on_gone=self._on_gone,
        )
        self._resync = Resync(
            self._tools, self._process_record, self._processes, self._books, self._release, self._record
        )

    # --- life -----------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say that somebody listens. Without it the kernel side stops nobody after Tuning.heartbeat_timeout_ns."""
        self._control.heartbeat_ns = monotonic_ns()

    def fileno(self) -> int:
        """Readable when events wait."""
        return self.reader.fileno()

    def drain(self) -> list[Event]:
        """Every event since the last call; then gives back the records of tool calls that are gone.

        After a loss (EventsLost) the calls that follow, for a second, also tell what was found again.
        """
        events = self.reader.drain()
        for event in events:
            match event:
                case ToolCallEnded():
                    self._books.ended.add(event.id)
                case BudgetReached(level=BudgetLevel.HARD):
                    self._books.stopped[event.id] = event.budget_bytes
                case EventsLost():
                    self._resync.lost()
                case _:
                    pass
        gone, self._gone = self._gone, []
        for tag, slot in gone:
            record = self._tools[slot]
            if record.tag != tag or not record.processes:  # else one was adopted since, and it is told of again
                self._release(tag, slot)
        now_ns = monotonic_ns()
        if self._missed.due(now_ns):
            events += self.bury()
        if self.reader.emptied and self._resync.due(now_ns):
            events += self._resync.look(now_ns)
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
                self._books.ended.add(tag)
                events.append(ToolCallEnded(monotonic_ns(), tag, None, None, peak_bytes=peak_bytes))
        return events

    @property
    def unrecorded_count(self) -> int:
        """Tool calls that run without a record, as last seen: they count as their agent, and have no budget."""
        return self._resync.unrecorded_count

    def close(self) -> None:
        """Stop reading and detach; afterwards nobody is stopped, and whoever is stopped stays so: resume() first."""
        self._control.heartbeat_ns = 0
        self._books.slots.clear()
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

    def adopt(self, pid: int, tag: ToolCallId, *, as_root: bool = False) -> None:
        """Add a running process to an existing tool call or agent. Raises UnknownTag, ProcessLookupError.

        `as_root`: its exit, and not that of the one which was the root so far, is the call's end.
        """
        slot = self._slot(tag)
        record = self._tools[slot]
        before = record.root_tgid
        if as_root:
            record.root_tgid = pid
        try:
            self._tag_process(pid, tag, slot, Role(record.role))
        except BaseException:
            record.root_tgid = before
            raise

    def forget(self, tag: ToolCallId) -> None:
        """Give back the record of an agent or tool call whose processes are no longer of interest. Safe to repeat."""
        if (slot := self._books.slots.get(tag)) is not None:
            self._release(tag, slot)

    def _begin(self, tag: ToolCallId, sandbox: CgroupId, role: Role, pid: int, **fields: int) -> ToolCallId:
        slot = ctypes.c_uint32()
        if not self._free.pop(slot):
            raise EbpfError(
                f"all {len(self._tools)} tool records are in use: start the daemon with more --tool-records"
            )
        record = self._tools[slot.value]
        ctypes.memset(ctypes.addressof(record), 0, ctypes.sizeof(record))
        record.sandbox_id, record.role, record.root_tgid = sandbox, role, pid
        record.started_ns = monotonic_ns()
        for name, value in fields.items():
            setattr(record, name, value)
        record.tag = tag  # last: from here on the kernel accepts the record
        self._books.slots[tag] = slot.value
        try:
            self._tag_process(pid, tag, slot.value, role)
        except BaseException:
            self._release(tag, slot.value)
            raise
        return tag

    def _record(self, root: int, pids: list[int], process: Any) -> int | None:
        """A record for a tool call that began when there was none, with the budgets of its agent's calls."""
        agent = self._tools[process.slot]
        if agent.tag != process.tag:
            return None  # its agent's record has gone
        tag = self.new_tag()
        try:
            self._begin(
                tag,
                CgroupId(agent.sandbox_id),
                Role.TOOL,
                root,
                agent_tag=agent.tag,
                soft_bytes=agent.child_soft_bytes,
                hard_bytes=agent.child_hard_bytes,
                flags=agent.flags & ToolFlag.STARTING,
            )
        except (EbpfError, ProcessLookupError):
            return None
        slot = self._books.slots[tag]
        for pid in pids:
            try:
                self._tag_process(pid, tag, slot, Role.TOOL)
            except (EbpfError, ProcessLookupError):
                continue  # it has ended meanwhile
        return slot

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
        slot = self._books.slots.get(tag)
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
        return tuple(ToolCallId(tag) for tag in self._books.slots)

    def processes(self, tag: ToolCallId) -> tuple[int, ...]:
        """Pids of a tool call's living processes, escapees included. Walks all followed ones if it has several."""
        slot = self._books.slots.get(tag)
        record = self._tools[slot] if slot is not None else None
        if record is not None and record.tag == tag and record.processes == 1:
            pid: int = record.root_tgid
            if self.tag_of(pid) == tag:
                return (pid,)
        everyone = self._processes.items(ctypes.c_uint32, self._process_record)
        return tuple(dict.fromkeys(pid for pid, process in everyone if process.tag == tag))

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
            self._books.stopped.pop(tag, None)
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
        slot = self._books.slots.get(tag)
        if slot is None or self._tools[slot].tag != tag:
            raise UnknownTag(tag)
        return slot

    def _on_gone(self, tag: int, slot: int) -> None:
        self._gone.append((tag, slot))

    def _release(self, tag: int, slot: int) -> None:
        if self._books.slots.get(tag) == slot:  # not of another record under the same tag
            self._books.forget(tag)
        record = self._tools[slot]
        if record.tag == tag:
            record.tag = 0
            self._free.update(None, ctypes.c_uint32(slot))


def _shared_array(a_map: BpfMap, element: type[Record]) -> Any:
    """The map's elements, shared with the kernel. Array elements are padded to 8 bytes; ours already are."""
    return (element * a_map.max_entries).from_buffer(a_map.map_memory(ctypes.sizeof(element)))
