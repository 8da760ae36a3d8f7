"""The cgroup leaf of each tool call, in sandboxes that are ours.

Owns which call has which leaf, and moving its processes there. Without cgroups, and in somebody else's container, no
call has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...policies.model import CgroupId, ToolCallId
from .. import log
from ..errors import CgroupError
from .cgroups import CgroupDriver, SandboxCgroup


@dataclass(slots=True)
class _Leaf:
    path: str
    sandbox: CgroupId


class Leaves:
    """`members(call)` are the call's processes as the kernel's tags know them: those that were forked before the move
    follow their root. None: nobody knows.
    """

    def __init__(self, driver: CgroupDriver | None, members: Callable[[ToolCallId], tuple[int, ...]] | None) -> None:
        self._driver = driver
        self._members = members
        self._leaves: dict[ToolCallId, _Leaf] = {}

    def path(self, call: ToolCallId) -> str | None:
        leaf = self._leaves.get(call)
        return leaf.path if leaf else None

    def make(self, call: ToolCallId, pid: int, cgroup: SandboxCgroup, sandbox: CgroupId) -> None:
        """Give a call its own cgroup and move it there. Safe for one that has a leaf, and where none can be had."""
        if self._driver is None or not cgroup.own or call in self._leaves:
            return
        members = self._members(call) if self._members is not None else (pid,)
        if not members:
            return  # it is over: making and removing a cgroup in four hierarchies takes as long as many a call
        try:
            path = self._driver.create_tool_leaf(cgroup.path, call)
        except CgroupError as error:
            log.warning("tool_leaf_failed", call=f"{call:016x}", error=str(error))
            return
        self._leaves[call] = _Leaf(path, sandbox)
        joined = self._driver.attach(pid, path)
        for child in self._members(call) if self._members is not None else ():
            if child != pid:
                self._driver.attach(child, path)
        if not joined.done and not self._driver.processes(path):
            self.drop(call)  # it was over before we could move it

    def join(self, call: ToolCallId, pid: int) -> None:
        """Move one more process to a call's leaf. Safe for a call without one."""
        if self._driver is not None and (path := self.path(call)) is not None:
            self._driver.attach(pid, path)

    def leave(self, call: ToolCallId, pid: int, cgroup: SandboxCgroup) -> None:
        """Move a process out of a call's leaf, to the sandbox's runtime. Safe for a call without one."""
        if self._driver is not None and self.path(call) is not None:
            self._driver.attach(pid, cgroup.runtime)

    def drop(self, call: ToolCallId) -> None:
        """Remove a leaf that has done its duty. Safe for a call without one."""
        leaf = self._leaves.pop(call, None)
        if leaf is None or self._driver is None:
            return
        self._driver.forget(leaf.path)
        removed = self._driver.remove(leaf.path, patience_s=0.0)
        if not removed.done and removed.detail:
            # A zombie of it is not reaped yet, or an escapee lives on: the sandbox's removal takes it along.
            log.debug("tool_leaf_left", problem=removed.detail)

    def forget(self, sandbox: CgroupId) -> None:
        """The sandbox's cgroup goes, and its leaves with it."""
        self._leaves = {call: leaf for call, leaf in self._leaves.items() if leaf.sandbox != sandbox}

    def processes(self, call: ToolCallId) -> tuple[int, ...]:
        leaf = self._leaves.get(call)
        return self._driver.processes(leaf.path) if leaf and self._driver is not None else ()

    def charged_peak(self, call: ToolCallId) -> int | None:
        """The most its leaf was charged, bytes; None without a leaf."""
        leaf = self._leaves.get(call)
        return self._driver.memory_peak(leaf.path) if leaf and self._driver is not None else None
