"""Processes that ended without the kernel's books being told.

Since 7.0 a program can be preempted, and is then skipped for other tasks of its CPU. Where on_exit and on_exit_again
miss the same exit, a process that no longer lives stays in the books, and its tool call would never end. Owns noticing
that and having the kernel take such processes out. Emits nothing itself.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .abi import Layouts
from .libbpf import BpfObject

LOOK_EVERY_NS = 1_000_000_000
LOOKS_AFTER_A_MISS = 3
"""The exit that was missed may not have finished when its miss is first seen."""


@dataclass(frozen=True, slots=True)
class Buried:
    """A process taken out of the books."""

    tgid: int
    tag: int
    slot: int


class MissedExits:
    """Looks for dead processes, but only for some seconds after the kernel counted a skipped program."""

    def __init__(self, bpf: BpfObject, layouts: Layouts, proc_root: Path = Path("/proc")) -> None:
        self._processes, self._request = bpf.maps["processes"], bpf.maps["retag"]
        self._record, self._retag = layouts.struct("process_record"), layouts.struct("retag_request")
        self._bury = bpf.programs["bury_process"]
        self._second_chance = bpf.programs["on_exit_again"]
        self._proc_root = proc_root
        self._misses_seen = 0
        self._looks_left = 0
        self._next_look_ns = 0

    def due(self, now_ns: int) -> bool:
        """Whether exits may have been missed lately. One small file is read, once a second."""
        if now_ns < self._next_look_ns:
            return False
        self._next_look_ns = now_ns + LOOK_EVERY_NS
        # An exit is lost only where the second program was skipped as well.
        misses = skipped_runs(self._second_chance.fd)
        if misses != self._misses_seen:
            self._misses_seen, self._looks_left = misses, LOOKS_AFTER_A_MISS
        self._looks_left -= 1
        return self._looks_left >= 0

    def bury(self) -> list[Buried]:
        """Takes every dead process out of the books. Walks all followed processes."""
        buried: list[Buried] = []
        for tgid, record in self._processes.items(ctypes.c_uint32, self._record):
            if self._lives(tgid):
                continue
            zero = ctypes.c_uint32(0)
            request: Any = self._retag(tag=record.tag, tgid=tgid)
            self._request.update(zero, request)
            self._bury.run_over_tasks(os.getpid())
            if self._request.lookup(zero, request) and request.tagged_tasks:  # else its exit was seen, only just now
                buried.append(Buried(tgid, record.tag, record.slot))
        return buried

    def _lives(self, tgid: int) -> bool:
        """A zombie is dead, unless it is a leader that waits for its threads."""
        directory = self._proc_root / str(tgid)
        try:
            state = (directory / "stat").read_bytes().rpartition(b") ")[2][:1]
            return state not in (b"Z", b"X") or len(list((directory / "task").iterdir())) > 1
        except (FileNotFoundError, ProcessLookupError):
            return False


def skipped_runs(program_fd: int) -> int:
    """How often a program was skipped because another run of it was unfinished; 0 before 5.12, which cannot say."""
    for line in Path(f"/proc/self/fdinfo/{program_fd}").read_text().splitlines():
        if line.startswith("recursion_misses:"):
            return int(line.split()[1])
    return 0
