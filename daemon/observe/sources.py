"""Samplers of the host and of the sandboxes: tasks that only emit events.

Owns the reading of /proc/meminfo, the PSI files and the sandboxes' cgroup counters, and the rule that a failing source
is logged, counted and tried again while the loop lives on. Gives no fact a meaning.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...policies.events import Event, HostSampled, SandboxSampled
from ...policies.model import CgroupId
from ...policies.snapshot import Snapshot
from .. import log
from ..errors import DaemonError
from ..sandboxes.cgroups import CgroupDriver, parse_pressure
from ..sandboxes.cgroups.files import read_text
from ..sandboxes.processes import PROC

HOST_INTERVAL_S = 0.5
SANDBOX_INTERVAL_S = 0.1
RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
QUIET_READS = 10
STILL_BYTES = 1 << 20
"""A change between two readings that is none."""
PSI_STALL_US = 150_000
PSI_WINDOW_US = 2_000_000
"""Without CAP_SYS_RESOURCE the kernel takes only windows that are multiples of 2 s."""

Emit = Callable[[Event], None]
NowNs = Callable[[], int]


class Source:
    """Samples again and again. Subclasses say what `sample()` does.

    A failure is logged when it begins and counted every time; the pause grows from 1 s to 30 s until it is over.
    """

    name = "source"

    def __init__(self, interval_s: float) -> None:
        self.failure_count = 0
        self._interval_s = interval_s

    def sample(self) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = RETRY_S
        failing = False
        while True:
            try:
                self.sample()
            except (OSError, ValueError, DaemonError, psutil.Error) as error:
                self.failure_count += 1
                if not failing:
                    log.warning("source_failed", source=self.name, error=error, retry_s=retry_s)
                failing = True
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, LONGEST_RETRY_S)
                continue
            if failing:
                log.event("source_recovered", source=self.name, failure_count=self.failure_count)
            failing, retry_s = False, RETRY_S
            await asyncio.sleep(self._interval_s)


class HostSampler(Source):
    """Emits HostSampled: memory of the machine, its pressure, and the GPUs' memory where `gpu` answers.

    `gpu` returns (total, used) bytes, or None without a GPU. PSI is None where the kernel lacks it (boot with psi=1).
    """

    name = "host"

    def __init__(
        self,
        emit: Emit,
        now_ns: NowNs,
        *,
        gpu: Callable[[], tuple[int, int] | None] | None = None,
        proc_root: Path = PROC,
        interval_s: float = HOST_INTERVAL_S,
    ) -> None:
        super().__init__(interval_s)
        self._emit = emit
        self._now_ns = now_ns
        self._gpu = gpu
        self._proc_root = proc_root

    def sample(self) -> None:
        memory = read_meminfo(self._proc_root)
        psi = parse_pressure(read_text(self._proc_root / "pressure/memory"))
        gpu = self._gpu() if self._gpu is not None else None
        self._emit(
            HostSampled(
                self._now_ns(),
                memory.total_bytes,
                memory.available_bytes,
                psi.some_ratio if psi is not None else None,
                psi.full_ratio if psi is not None else None,
                gpu[0] if gpu is not None else None,
                gpu[1] if gpu is not None else None,
            )
        )


class SandboxSampler(Source):
    """Emits SandboxSampled for every sandbox of the latest snapshot whose cgroup is there and has changed.

    One that is gone is passed over: its removal is somebody else's event. One in which no tool call runs, and whose
    memory stands still, is read once in QUIET_READS samples, not all of them in the same: 200 agents that wait for
    their model cost 10 % of a core else.
    """

    name = "sandboxes"

    def __init__(
        self,
        driver: CgroupDriver,
        snapshot: Callable[[], Snapshot],
        emit: Emit,
        now_ns: NowNs,
        *,
        interval_s: float = SANDBOX_INTERVAL_S,
    ) -> None:
        super().__init__(interval_s)
        self._driver = driver
        self._snapshot = snapshot
        self._emit = emit
        self._now_ns = now_ns
        self._known: dict[CgroupId, str] = {}
        self._due: dict[CgroupId, int] = {}
        """The sample at which each is read again."""
        self._last: dict[CgroupId, tuple[int, int, int]] = {}
        self._count = 0

    def sample(self) -> None:
        now_ns = self._now_ns()
        snapshot = self._snapshot()
        current = {s.cgroup_id: s.path for s in snapshot.sandboxes}
        if current.keys() != self._known.keys():
            for gone in self._known.keys() - current.keys():
                self._driver.forget(self._known[gone])
                self._due.pop(gone, None)
                self._last.pop(gone, None)
        self._known = current
        self._count += 1
        busy = {call.sandbox for call in snapshot.tool_calls if call.gone_ns is None}
        for cgroup_id, path in current.items():
            if self._due.get(cgroup_id, 0) <= self._count or cgroup_id in busy:
                self._read(cgroup_id, path, now_ns)

    def _read(self, cgroup_id: CgroupId, path: str, now_ns: int) -> None:
        used = self._driver.memory_usage(path)
        if used is None:
            return
        peak = self._driver.memory_peak(path)
        found = (used, max(used, peak or 0), self._driver.cpu_ns(path) or 0)
        last = self._last.get(cgroup_id)
        still = last is not None and abs(used - last[0]) < STILL_BYTES
        first = self._due.get(cgroup_id) is None
        # The first time of each spreads them over the samples.
        pause = 1 + cgroup_id % QUIET_READS if first else QUIET_READS if still else 1
        self._due[cgroup_id] = self._count + pause
        self._last[cgroup_id] = found
        if found != last:
            self._emit(SandboxSampled(now_ns, cgroup_id, *found))


class PressureTrigger:
    """Calls back at once when the machine stalls for memory, instead of at the next sample.

    Registers a PSI trigger (Documentation/accounting/psi.rst): `stall_us` of stall within `window_us`. Optional: where
    the kernel refuses, `open` answers None and sampling alone must do.
    """

    def __init__(self, trigger: int, poll: select.epoll) -> None:
        self._trigger = trigger
        self._poll = poll

    @classmethod
    def open(
        cls, proc_root: Path = PROC, *, stall_us: int = PSI_STALL_US, window_us: int = PSI_WINDOW_US
    ) -> PressureTrigger | None:
        path = proc_root / "pressure/memory"
        try:
            trigger = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            log.event("pressure_trigger_unavailable", path=str(path), error=error)
            return None
        try:
            os.write(trigger, f"some {stall_us} {window_us}\0".encode("ascii"))
            # asyncio waits for "readable" alone and a trigger says "urgent": an epoll in between turns one into the
            # other, since an epoll descriptor is readable while something in it is ready.
            poll = select.epoll()
            poll.register(trigger, select.EPOLLPRI | select.EPOLLERR)
        except OSError as error:
            log.event("pressure_trigger_unavailable", path=str(path), error=error)
            os.close(trigger)
            return None
        return cls(trigger, poll)

    def watch(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the running loop, at most once a window."""

        def ready() -> None:
            if any(flags & select.EPOLLPRI for _, flags in self._poll.poll(0)):
                callback()

        asyncio.get_running_loop().add_reader(self._poll.fileno(), ready)

    def close(self) -> None:
        """Also ends `watch`."""
        try:
            asyncio.get_running_loop().remove_reader(self._poll.fileno())
        except RuntimeError:
            pass  # no loop runs any more
        self._poll.close()
        os.close(self._trigger)


@dataclass(frozen=True, slots=True)
class HostMemory:
    total_bytes: int
    available_bytes: int


def read_meminfo(proc_root: Path = PROC) -> HostMemory:
    """MemTotal and MemAvailable; by psutil where there is no such file (a restricted /proc). Raises ValueError."""
    text = read_text(proc_root / "meminfo")
    if text is None:
        measured = psutil.virtual_memory()
        return HostMemory(measured.total, measured.available)
    found: dict[str, int] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in ("MemTotal", "MemAvailable"):
            found[key] = int(rest.split()[0]) * 1024
    try:
        return HostMemory(found["MemTotal"], found["MemAvailable"])
    except KeyError as error:
        raise ValueError(f"{proc_root}/meminfo: no line {error}") from error
