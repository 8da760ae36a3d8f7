"""Processes by identity, not by number: a pid together with the time it was started.

Owns reading /proc/<pid> and sending signals. A pid is reused once its process is gone; a signal therefore goes through
a pidfd that was opened first and checked against the start time after, so that it can reach no other process.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cgroups.files import Applied, Effect, read_text

PROC = Path("/proc")
SIGNAL_TIER = "signal"
_DEAD = frozenset("ZXx")
_PF_FORKNOEXEC = 0x40
_PF_KTHREAD = 0x200000
"""include/linux/sched.h; field 9 of /proc/<pid>/stat shows them."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process for all time (of one boot)."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/<pid>/stat (proc(5)): clock ticks after boot."""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    state: str
    """One letter of proc(5): R S D T t Z X I."""
    parent_pid: int
    start_ticks: int
    flags: int = 0

    @property
    def kernel_thread(self) -> bool:
        return bool(self.flags & _PF_KTHREAD)

    @property
    def execed(self) -> bool:
        """It has exec'd since it was forked: what the kernel's lineage takes for a tool call of its agent."""
        return not self.flags & _PF_FORKNOEXEC

    @property
    def alive(self) -> bool:
        return self.state not in _DEAD

    @property
    def stopped(self) -> bool:
        """Stopped by a signal (not by a debugger)."""
        return self.state == "T"


def stat(pid: int, proc_root: Path = PROC) -> ProcessStat | None:
    """None: there is no such process."""
    text = read_text(proc_root / str(pid) / "stat")
    if not text:
        return None
    # The command name stands in parentheses and may hold blanks and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessStat(fields[0], int(fields[1]), int(fields[19]), int(fields[6]))


def identify(pid: int, proc_root: Path = PROC) -> ProcessRef | None:
    """None: there is no such process, or it is a zombie."""
    found = stat(pid, proc_root)
    return ProcessRef(pid, found.start_ticks) if found is not None and found.alive else None


def ancestors(pid: int, proc_root: Path = PROC) -> tuple[int, ...]:
    """Its parent, the parent's parent, and so on; empty where it is gone."""
    found: list[int] = []
    while (seen := stat(pid, proc_root)) is not None and seen.parent_pid > 0 and seen.parent_pid not in found:
        pid = seen.parent_pid
        found.append(pid)
    return tuple(found)


def leader(pid: int, proc_root: Path = PROC) -> int | None:
    """The process that a thread belongs to: itself where it is one. None: gone."""
    for line in (read_text(proc_root / str(pid) / "status") or "").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return None


def look(ref: ProcessRef, proc_root: Path = PROC) -> ProcessStat | None:
    """What the process is doing; None: it is gone, whoever has its pid now."""
    found = stat(ref.pid, proc_root)
    return found if found is not None and found.start_ticks == ref.start_ticks and found.alive else None


def send(ref: ProcessRef, number: signal.Signals, proc_root: Path = PROC) -> Applied:
    """Signal exactly this process. GONE: it ended, or its pid belongs to another by now. Never raises OSError."""
    try:
        descriptor = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return Applied(Effect.GONE, SIGNAL_TIER, f"pid {ref.pid}: no such process")
    except OSError as error:
        if error.errno == errno.EINVAL:  # a thread that leads no process any more
            return Applied(Effect.GONE, SIGNAL_TIER, f"pid {ref.pid}: no such process")
        return Applied(Effect.FAILED, SIGNAL_TIER, f"pid {ref.pid}: pidfd_open: {error.strerror}")
    try:
        if look(ref, proc_root) is None:
            return Applied(Effect.GONE, SIGNAL_TIER, f"pid {ref.pid}: ended")
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return Applied(Effect.GONE, SIGNAL_TIER, f"pid {ref.pid}: ended")
    except OSError as error:
        return Applied(Effect.FAILED, SIGNAL_TIER, f"pid {ref.pid}: {number.name}: {error.strerror}: run as root")
    finally:
        os.close(descriptor)
    return Applied(Effect.DONE, SIGNAL_TIER, count=1)


def descendants(pid: int, proc_root: Path = PROC) -> tuple[int, ...]:
    """The process and all that descend from it and are still its (grand)children, parents first.

    One that was orphaned has another parent by now and is missed: with eBPF lineage, or a cgroup, it is not.
    """
    children: dict[int, list[int]] = {}
    for entry in os.listdir(proc_root):  # noqa: PTH208 - thousands of entries: names are enough
        if entry.isdigit() and (found := stat(int(entry), proc_root)) is not None and found.alive:
            children.setdefault(found.parent_pid, []).append(int(entry))
    if stat(pid, proc_root) is None:
        return ()
    found_pids, pending = [], [pid]
    while pending:
        current = pending.pop(0)
        found_pids.append(current)
        pending.extend(children.get(current, ()))
    return tuple(found_pids)


def resident_bytes(pids: Iterable[int], proc_root: Path = PROC) -> int:
    """Resident memory of the processes, shared pages counted once for each; the gone count nothing."""
    total = 0
    for pid in pids:
        fields = (read_text(proc_root / str(pid) / "statm") or "").split()
        total += int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0
    return total


def boot_id(proc_root: Path = PROC) -> str:
    """Changes with every boot; pids, start times, cgroups and the monotonic clock mean nothing across it."""
    return (read_text(proc_root / "sys/kernel/random/boot_id") or "unknown").strip()


def tied_to_us(argv: Sequence[str]) -> tuple[str, ...]:
    """The command as a child that gets SIGTERM when the thread that started it ends, kill -9 included.

    By setpriv (util-linux) and not by `preexec_fn`: Python code between fork and exec crashes in a process that has
    gRPC's threads (74 of 300 starts under load, 0 of 300 without). Without setpriv the child is not tied.
    """
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "TERM", "--", *argv) if setpriv else tuple(argv)


def network_namespace(pid: int, proc_root: Path = Path("/proc")) -> int | None:
    """Inode of the network namespace a process is in; None where it is gone or not ours to see."""
    try:
        return (proc_root / str(pid) / "ns/net").stat().st_ino
    except OSError:
        return None
