"""The one way to control and measure a cgroup, whichever layout the host has.

Owns the names of the kernel's files on either layout; `tree.py` owns the directories. Decides nothing, keeps no record
of what it changed (the actuator's journal does), and never raises because a cgroup or process is gone: that is
`Effect.GONE`, or None where a number was asked for.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .files import Applied, Effect, parse_int, read_int, read_text, write_text
from .layout import Hierarchy, Layout, LayoutKind
from .meter import Meter
from .tree import DEFAULT_BASE, CgroupTree, checked_path, open_tree_layout

CPU_PERIOD_US = 100_000
CPU_QUOTA_MIN_US = 1_000
"""The kernel refuses less (Documentation/scheduler/sched-bwc.rst)."""
_KILL_PASSES = 20
_UNLIMITED_V1_BYTES = 1 << 62


class Limit(Enum):
    """A limit that can be set, read back as text and restored."""

    MEMORY_HIGH = "memory.high"
    MEMORY_MAX = "memory.max"
    CPU_QUOTA = "cpu quota"


@dataclass(frozen=True, slots=True)
class MemoryEvents:
    """Counts since the cgroup was made. On v1 `max_count` is memory.failcnt and nothing is known of `high`."""

    high_count: int
    max_count: int
    oom_kill_count: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Share of the last 10 s in which some, or all, tasks of a cgroup waited for memory; and the total so far."""

    some_ratio: float
    full_ratio: float
    some_total_us: int
    full_total_us: int


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    usage: str
    peak: str
    max: str


_MEMORY_V1 = _MemoryFiles("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
_MEMORY_V2 = _MemoryFiles("memory.current", "memory.peak", "memory.max")


class CgroupDriver(CgroupTree):
    """Paths are relative to the hierarchy's root, without a leading slash, as in `Sandbox.path`."""

    def __init__(self, layout: Layout, base: str = DEFAULT_BASE, *, proc_root: Path = Path("/proc")) -> None:
        super().__init__(layout, base, proc_root=proc_root)
        self._meter = Meter()
        self._memory_mount = str(layout.memory.mount)
        self._measured_mounts = {self._memory_mount, str(layout.unified.mount)}
        self._highest: dict[str, int] = {}
        self._memory_files = _MEMORY_V2 if layout.kind is LayoutKind.V2 else _MEMORY_V1

    @classmethod
    def open(
        cls,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        proc_root: Path = Path("/proc"),
        base: str | None = None,
    ) -> CgroupDriver:
        """Detect the layout. `base`: None takes the delegated cgroup under systemd, else `equipoise`.

        Raises LayoutError. Changes nothing; `prepare()` does.
        """
        layout, base = open_tree_layout(cgroup_root, proc_root, base)
        return cls(layout, base, proc_root=proc_root)

    def close(self) -> None:
        self._meter.close()

    # -- measuring

    def memory_usage(self, path: str) -> int | None:
        """Bytes charged to the cgroup and all below it, page cache included; None: gone."""
        return self._meter.read_int(f"{self._memory_mount}/{path}/{self._memory_files.usage}")

    def memory_resident(self, path: str) -> int | None:
        """Bytes that cannot simply be dropped: usage without the page cache of files (shared memory is kept in)."""
        used = self.memory_usage(path)
        counts = _pairs(read_text(self._memory(path, "memory.stat")))
        if used is None or counts is None:
            return None
        # v1 counts a cgroup alone under the short names and with its children under total_*.
        prefix = "" if self.layout.kind is LayoutKind.V2 else "total_"
        cache = counts.get(f"{prefix}active_file", 0) + counts.get(f"{prefix}inactive_file", 0)
        return max(0, used - cache)

    def memory_peak(self, path: str) -> int | None:
        """Most that was charged since it was made.

        On kernels without memory.peak (v2 before 5.19) it is the most that was seen by asking here again and again.
        """
        peak = self._meter.read_int(f"{self._memory_mount}/{path}/{self._memory_files.peak}")
        if peak is None and (used := self.memory_usage(path)) is not None:
            peak = self._highest[path] = max(used, self._highest.get(path, 0))
        return peak

    def cpu_ns(self, path: str) -> int | None:
        """CPU time of the cgroup and all below it. The v2 mount counts it on either layout."""
        text = self._meter.read(f"{self.layout.unified.mount}/{path}/cpu.stat")
        if text is None or not text.startswith(b"usage_usec "):
            return None
        return int(text.split(maxsplit=2)[1]) * 1000

    def forget(self, path: str) -> None:
        """Close the descriptors kept for a cgroup and those below it. Safe for one that was never measured."""
        for mount in self._measured_mounts:
            self._meter.forget(f"{mount}/{path}")
        for known in [p for p in self._highest if p == path or p.startswith(path + "/")]:
            del self._highest[known]

    def events(self, path: str) -> MemoryEvents | None:
        if self.layout.kind is LayoutKind.V2:
            counts = _pairs(read_text(self._memory(path, "memory.events")))
            if counts is None:
                return None
            return MemoryEvents(counts.get("high", 0), counts.get("max", 0), counts.get("oom_kill", 0))
        counts = _pairs(read_text(self._memory(path, "memory.oom_control")))
        failures = read_text(self._memory(path, "memory.failcnt"))
        if counts is None or failures is None:
            return None
        return MemoryEvents(0, parse_int(failures) or 0, counts.get("oom_kill", 0))

    def pressure(self, path: str) -> Stall | None:
        """None: gone, or PSI is off (boot with psi=1)."""
        return parse_pressure(read_text(self.unified_directory(path) / "memory.pressure"))

    # -- limits

    def set_memory_high(self, path: str, high_bytes: int | None) -> Applied:
        """Slow down and reclaim above it; None: no limit. UNAVAILABLE on v1, which has nothing like it.

        Without swap, a limit below the working set stalls its tasks for good: cap it in time.
        """
        return self.restore(path, Limit.MEMORY_HIGH, _bytes_text(high_bytes))

    def set_memory_max(self, path: str, max_bytes: int | None) -> Applied:
        """The hard limit; None: none. On v1, below present usage that cannot be reclaimed, FAILED (EBUSY)."""
        return self.restore(path, Limit.MEMORY_MAX, _bytes_text(max_bytes))

    def set_cpu_quota(self, path: str, cpus: float | None) -> Applied:
        """At most that many CPUs (0.5: half of one), at least 0.01; None: no quota."""
        quota_us = None if cpus is None else max(CPU_QUOTA_MIN_US, round(cpus * CPU_PERIOD_US))
        hierarchy = self.layout.cpu
        if hierarchy is not None and hierarchy.version == 1:
            return self.restore(path, Limit.CPU_QUOTA, "-1" if quota_us is None else str(quota_us))
        return self.restore(path, Limit.CPU_QUOTA, f"{'max' if quota_us is None else quota_us} {CPU_PERIOD_US}")

    def limit(self, path: str, limit: Limit) -> str | None:
        """A limit as the kernel writes it, for `restore`; None: gone, or this layout has no such limit."""
        file = self._limit_file(path, limit)
        text = read_text(file) if file is not None else None
        return text.strip() if text is not None else None

    def restore(self, path: str, limit: Limit, text: str) -> Applied:
        """Set a limit from the text that `limit()` gave, or to `max`."""
        tier = self.tier_of(limit)
        file = self._limit_file(path, limit)
        if file is None:
            return Applied(Effect.UNAVAILABLE, tier, f"{path}: {limit.value} does not exist on this layout")
        if text == "max" and file.name not in ("memory.high", "memory.max", "cpu.max"):
            text = "-1"
        return write_text(file, text, tier)

    def lift(self, path: str, keep: frozenset[Limit] = frozenset()) -> tuple[Applied, ...]:
        """Thaw, and take every limit that we know how to set away, but those in `keep`. Below our base only."""
        limits = [limit for limit in Limit if limit not in keep and self._limit_file(path, limit) is not None]
        return (self.thaw(path), *(self.restore(path, limit, "max") for limit in limits))

    def restricted(self, path: str, keep: frozenset[Limit] = frozenset()) -> int:
        """How many things `lift` would undo: frozen, and each limit that is set."""
        count = int(read_int(self.unified_directory(path) / "cgroup.freeze") == 1)
        return count + sum(1 for limit in Limit if limit not in keep and self._is_set(path, limit))

    def tier_of(self, limit: Limit) -> str:
        hierarchy = self.layout.cpu if limit is Limit.CPU_QUOTA else self.layout.memory
        return f"cgroup-v{hierarchy.version if hierarchy is not None else 2} {limit.value}"

    # -- stopping

    def freeze(self, path: str) -> Applied:
        """Ask the kernel to freeze everything in it. The kernel needs some milliseconds more: see `frozen`."""
        return write_text(self.unified_directory(path) / "cgroup.freeze", "1", "cgroup.freeze")

    def thaw(self, path: str) -> Applied:
        return write_text(self.unified_directory(path) / "cgroup.freeze", "0", "cgroup.freeze")

    def frozen(self, path: str) -> bool | None:
        """Whether everything in it has come to a halt; None: gone."""
        counts = _pairs(read_text(self.unified_directory(path) / "cgroup.events"))
        return None if counts is None else counts.get("frozen") == 1

    def populated(self, path: str) -> bool | None:
        """Whether a living process is in it or below it; None: gone."""
        counts = _pairs(read_text(self.unified_directory(path) / "cgroup.events"))
        return None if counts is None else counts.get("populated") == 1

    def kill(self, path: str) -> Applied:
        """SIGKILL to everything in the cgroup and below it, frozen or not, forks included.

        By cgroup.kill (Linux 5.14), else by freezing first, so that nothing forks away or exits under a pid that we
        are about to signal. The processes are zombies until their parents wait for them.
        """
        count = len(self.processes(path))
        result = write_text(self.unified_directory(path) / "cgroup.kill", "1", "cgroup.kill")
        if result.effect is Effect.UNAVAILABLE:
            return self._kill_frozen(path)
        return Applied(result.effect, result.tier, result.detail, count if result.done else 0)

    def _kill_frozen(self, path: str) -> Applied:
        tier = "cgroup.freeze + SIGKILL"
        self.freeze(path)
        killed: set[int] = set()
        try:
            for _ in range(_KILL_PASSES):
                fresh = set(self.processes(path)) - killed
                if not fresh:
                    break
                for pid in fresh:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass  # it was on its way out
                    except PermissionError as error:
                        return Applied(Effect.FAILED, tier, f"pid {pid}: SIGKILL: {error.strerror}: run as root")
                killed |= fresh
        finally:
            self.thaw(path)
        return Applied(Effect.DONE, tier, count=len(killed))

    def reclaim(self, path: str, amount_bytes: int) -> Applied:
        """Ask the kernel to reclaim that much now. PARTIAL: less could be had (EAGAIN). v1 has nothing like it.

        Blocks while the kernel works, up to seconds: call it from a thread.
        """
        tier = "cgroup-v2 memory.reclaim"
        if self.layout.kind is not LayoutKind.V2:
            return Applied(Effect.UNAVAILABLE, tier, f"{path}: memory.reclaim needs the memory controller on v2")
        return write_text(self._memory(path, "memory.reclaim"), str(amount_bytes), tier)

    # -- inside

    def _memory(self, path: str, file: str) -> Path:
        return self.layout.memory.mount / checked_path(path) / file

    def _is_set(self, path: str, limit: Limit) -> bool:
        text = self.limit(path, limit)
        if text is None or text.startswith(("max", "-1")):
            return False
        # v1 has no word for "none": it reads the largest multiple of the page size.
        return not (text.isdigit() and int(text) >= _UNLIMITED_V1_BYTES)

    def _limit_file(self, path: str, limit: Limit) -> Path | None:
        path = checked_path(path)
        match limit:
            case Limit.MEMORY_HIGH:
                return self._memory(path, "memory.high") if self.layout.kind is LayoutKind.V2 else None
            case Limit.MEMORY_MAX:
                return self._memory(path, self._memory_files.max)
            case Limit.CPU_QUOTA:
                return _cpu_quota_file(self.layout.cpu, path)


def parse_pressure(text: str | None) -> Stall | None:
    """A PSI file: `some avg10=1.50 avg60=... avg300=... total=12345` and the same for `full`; None where it is not."""
    lines: dict[str, dict[str, str]] = {}
    for line in (text or "").splitlines():
        kind, *fields = line.split()
        lines[kind] = dict(field.split("=", 1) for field in fields if "=" in field)
    try:
        some, full = lines["some"], lines["full"]
        return Stall(float(some["avg10"]) / 100, float(full["avg10"]) / 100, int(some["total"]), int(full["total"]))
    except (KeyError, ValueError):
        return None


def _cpu_quota_file(hierarchy: Hierarchy | None, path: str) -> Path | None:
    if hierarchy is None:
        return None
    return hierarchy.mount / path / ("cpu.max" if hierarchy.version == 2 else "cpu.cfs_quota_us")


def _bytes_text(limit_bytes: int | None) -> str:
    return "max" if limit_bytes is None else str(limit_bytes)


def _pairs(text: str | None) -> dict[str, int] | None:
    """`key value` lines; None where there is no file."""
    if text is None:
        return None
    return {key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines()) if value.isdigit()}
