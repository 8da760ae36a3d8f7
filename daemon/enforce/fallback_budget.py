"""Budgets kept from user space, for hosts where no eBPF program can stop a tool call.

Owns the polling: every 50 ms it looks at each tool call's memory, and at the hard budget freezes its cgroup leaf (or,
without one, stops its processes). It speaks the same events as the kernel side and takes budgets through the same
seam, so nothing above it knows the difference but the tier that decisions are stamped with. It is later than the
kernel: what grows 1 GiB/s overshoots by about 50 MiB.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...policies.events import BudgetLevel, BudgetReached, Event, ProcessesGone, ToolCallMemoryStepped
from ...policies.model import MIB, ToolCallId
from .. import log
from ..errors import JournalError
from ..observe.journal import Hold, HoldCause
from ..sandboxes import processes
from ..sandboxes.cgroups import CgroupDriver, Effect
from ..sandboxes.processes import PROC, ProcessRef
from .freeze import FREEZE
from .holds import Holds
from .stop import STOP, UNANSWERED_NS

TIER = "user-space poll"
INTERVAL_S = 0.05
STEP_BYTES = MIB


@dataclass(slots=True)
class _Followed:
    tool_call: ToolCallId
    leaf: str | None
    root: ProcessRef | None
    soft_bytes: int
    hard_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    charged_bytes: int = 0
    """The cgroup's usage at the last exact reading."""
    soft_reported: bool = False
    stopped: bool = False
    seen_alive: bool = False


class FallbackBudget:
    """Implements `targets.Budgets`. One thread."""

    def __init__(
        self,
        driver: CgroupDriver | None,
        holds: Holds,
        emit: Callable[[Event], None],
        *,
        now_ns: Callable[[], int] = time.monotonic_ns,
        proc_root: Path = PROC,
    ) -> None:
        self._driver = driver
        self._holds = holds
        self._emit = emit
        self._now_ns = now_ns
        self._proc_root = proc_root
        self._followed: dict[ToolCallId, _Followed] = {}

    def follow(
        self,
        tool_call: ToolCallId,
        *,
        leaf: str | None = None,
        pid: int | None = None,
        soft_bytes: int = 0,
        hard_bytes: int = 0,
    ) -> bool:
        """Watch a tool call from now on, by its leaf or, without one, by its root process. False: it is gone."""
        root = processes.identify(pid, self._proc_root) if pid is not None else None
        if leaf is None and root is None:
            return False
        self._followed[tool_call] = _Followed(tool_call, leaf, root, soft_bytes, hard_bytes)
        return True

    def unfollow(self, tool_call: ToolCallId) -> None:
        """Stop watching it; nothing that is stopped goes on by this."""
        self._followed.pop(tool_call, None)

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Poll until cancelled."""
        while True:
            self.poll()
            await asyncio.sleep(interval_s)

    def poll(self) -> None:
        """Look at every tool call once."""
        now_ns = self._now_ns()
        for followed in tuple(self._followed.values()):
            used = self._used_bytes(followed)
            if used is None:
                if followed.seen_alive:
                    del self._followed[followed.tool_call]
                    self._emit(ProcessesGone(now_ns, followed.tool_call))
                continue
            followed.seen_alive = True
            followed.peak_bytes = max(followed.peak_bytes, used)
            if abs(used - followed.used_bytes) >= STEP_BYTES:
                followed.used_bytes = used
                self._emit(ToolCallMemoryStepped(now_ns, followed.tool_call, used, followed.peak_bytes))
            self._check(followed, used, now_ns)

    # -- targets.Budgets

    def set_budget(self, tag: ToolCallId, /, *, soft_bytes: int, hard_bytes: int) -> None:
        followed = self._known(tag)
        followed.soft_bytes, followed.hard_bytes = soft_bytes, hard_bytes
        followed.soft_reported = False

    def processes(self, tag: ToolCallId, /) -> tuple[int, ...]:
        followed = self._followed.get(tag)
        return self._pids(followed) if followed is not None else ()

    def resume(self, tag: ToolCallId, /) -> int:
        followed = self._known(tag)
        followed.stopped = False
        count = len(self._pids(followed))
        undone = self._holds.undo(self._holds.of(tag, HoldCause.BUDGET))
        return count if undone else 0

    # -- inside

    def _known(self, tag: ToolCallId) -> _Followed:
        followed = self._followed.get(tag)
        if followed is None:
            raise LookupError(f"no tool call {tag:016x}: it ended or was never followed")
        return followed

    def _check(self, followed: _Followed, used: int, now_ns: int) -> None:
        if followed.hard_bytes and used >= followed.hard_bytes and not followed.stopped:
            pids = self._pids(followed)
            if not self._stop(followed, pids, now_ns):
                return
            followed.stopped = True
            pid = followed.root.pid if followed.root is not None else next(iter(pids), 0)
            self._emit(BudgetReached(now_ns, followed.tool_call, BudgetLevel.HARD, followed.hard_bytes, used, pid))
        elif followed.soft_bytes and used >= followed.soft_bytes and not followed.soft_reported:
            followed.soft_reported = True
            pid = followed.root.pid if followed.root is not None else next(iter(self._pids(followed)), 0)
            self._emit(BudgetReached(now_ns, followed.tool_call, BudgetLevel.SOFT, followed.soft_bytes, used, pid))

    def _stop(self, followed: _Followed, pids: tuple[int, ...], now_ns: int) -> bool:
        expires_ns = now_ns + UNANSWERED_NS
        tool_call, cause = followed.tool_call, HoldCause.BUDGET
        try:
            if followed.leaf is not None and self._driver is not None:
                hold = Hold(FREEZE, cause, now_ns, expires_ns, tool_call, path=followed.leaf)
                held = self._holds.take(hold)
                results = [self._driver.freeze(followed.leaf)]
            else:
                refs = [r for pid in pids if (r := processes.identify(pid, self._proc_root)) is not None]
                held = self._holds.take(*(Hold(STOP, cause, now_ns, expires_ns, tool_call, process=r) for r in refs))
                results = [processes.send(r, signal.SIGSTOP, self._proc_root) for r in refs]
        except JournalError as error:
            log.warning("budget_stop_not_journalled", tool_call=f"{tool_call:016x}", error=error)
            return False
        if any(r.done for r in results):
            return True
        self._holds.undo(held)
        failed = next((r.detail for r in results if r.effect is Effect.FAILED), "")
        if failed:
            log.warning("budget_stop_failed", tool_call=f"{tool_call:016x}", detail=failed)
        return False

    def _used_bytes(self, followed: _Followed) -> int | None:
        """None: nothing of it lives any more."""
        if followed.leaf is not None and self._driver is not None:
            charged = self._driver.memory_usage(followed.leaf)
            if charged is None or not self._driver.populated(followed.leaf):
                return None
            # Reading memory.stat costs ten times reading the usage: only where the usage has moved.
            if abs(charged - followed.charged_bytes) < STEP_BYTES and followed.seen_alive:
                return followed.used_bytes
            followed.charged_bytes = charged
            return self._driver.memory_resident(followed.leaf)
        pids = self._pids(followed)
        return processes.resident_bytes(pids, self._proc_root) if pids else None

    def _pids(self, followed: _Followed) -> tuple[int, ...]:
        if followed.leaf is not None and self._driver is not None:
            return self._driver.processes(followed.leaf)
        if followed.root is not None and processes.look(followed.root, self._proc_root) is not None:
            return processes.descendants(followed.root.pid, self._proc_root)
        return ()
