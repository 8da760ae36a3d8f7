"""What there is to act on: where each tool call is, and its living processes.

Owns what is known of a tool call (its cgroup leaf, root process, agent) under each of its ids. A tool call with a
cgroup leaf of its own is controlled through the leaf; any other by signals to exactly its processes, checked by start
time. Must not: act, or ever count an agent or the daemon among a call's processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...policies.model import ToolCallId
from ..sandboxes import processes
from ..sandboxes.cgroups import CgroupDriver
from ..sandboxes.processes import PROC, ProcessRef


class Budgets(Protocol):
    """Where budgets are enforced: the kernel (ebpf), or user space (`fallback_budget`).

    A tool call that it does not know raises LookupError.
    """

    def set_budget(self, tag: ToolCallId, /, *, soft_bytes: int, hard_bytes: int) -> None:
        """0: none. Continues nobody."""
        ...

    def processes(self, tag: ToolCallId, /) -> tuple[int, ...]:
        """Its living processes, escapees included; empty where it is not known."""
        ...

    def resume(self, tag: ToolCallId, /) -> int:
        """Continue those that were stopped at a budget; answers how many processes."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tool call is, as far as it is known."""

    tool_call: ToolCallId
    leaf: str | None = None
    """Its own cgroup; None: it shares its agent's."""
    root: ProcessRef | None = None
    agent_pid: int | None = None
    hard_bytes: int = 0


class Targets:
    """Every tool call that was bound, until it is unbound."""

    def __init__(self, driver: CgroupDriver | None, budgets: Budgets | None, proc_root: Path = PROC) -> None:
        self._driver = driver
        self._budgets = budgets
        self._proc_root = proc_root
        self._targets: dict[ToolCallId, Target] = {}
        self._aliases: dict[ToolCallId, ToolCallId] = {}

    def find(self, tool_call: ToolCallId) -> Target:
        """By any of its ids; one that was never bound is known by its id alone."""
        tool_call = self._aliases.get(tool_call, tool_call)
        return self._targets.get(tool_call) or Target(tool_call)

    def all(self) -> tuple[Target, ...]:
        return tuple(self._targets.values())

    def ids(self, target: Target) -> tuple[ToolCallId, ...]:
        """Its own first, then those that were merged into it."""
        return (target.tool_call, *(old for old, new in self._aliases.items() if new == target.tool_call))

    def put(self, target: Target) -> None:
        self._targets[target.tool_call] = target

    def put_known(self, target: Target) -> None:
        """As `put`, where it is bound; does nothing else."""
        if target.tool_call in self._targets:
            self.put(target)

    def bind(
        self,
        tool_call: ToolCallId,
        *,
        leaf: str | None = None,
        pid: int | None = None,
        agent_pid: int | None = None,
        hard_bytes: int | None = None,
    ) -> None:
        """Say where a tool call is; called again, it adds what was not known."""
        known = self.find(tool_call)
        root = processes.identify(pid, self._proc_root) if pid is not None else None
        self.put(
            replace(
                known,
                leaf=leaf if leaf is not None else known.leaf,
                root=root or known.root,
                agent_pid=agent_pid if agent_pid is not None else known.agent_pid,
                hard_bytes=hard_bytes if hard_bytes is not None else known.hard_bytes,
            )
        )

    def merge(self, tool_call: ToolCallId, into: ToolCallId) -> None:
        """Both ids mean `into` from now on; its leaf and root process come along where `into` has none."""
        if tool_call == into:
            return
        known, target = self._targets.pop(tool_call, Target(tool_call)), self.find(into)
        self._aliases[tool_call] = target.tool_call
        self.put(
            replace(
                target,
                leaf=target.leaf or known.leaf,
                root=target.root or known.root,
                agent_pid=target.agent_pid or known.agent_pid,
                hard_bytes=max(target.hard_bytes, known.hard_bytes),
            )
        )

    def unbind(self, tool_call: ToolCallId) -> None:
        """Forget a tool call under all of its ids."""
        gone = self.find(tool_call).tool_call
        self._targets.pop(gone, None)
        self._aliases = {old: new for old, new in self._aliases.items() if gone not in (old, new)}

    def processes(self, target: Target) -> tuple[ProcessRef, ...]:
        """Living processes of the call, never its agent nor us. Listed twice: a pid reused in between drops out."""
        refs = [r for pid in self._pids(target) if (r := processes.identify(pid, self._proc_root)) is not None]
        if not refs:
            return ()
        still = set(self._pids(target)) - {target.agent_pid, os.getpid(), os.getppid(), 0, 1}
        return tuple(r for r in refs if r.pid in still)

    def _pids(self, target: Target) -> tuple[int, ...]:
        found: set[int] = set()
        if self._budgets is not None:
            found.update(self._budgets.processes(target.tool_call))
        if target.leaf is not None and self._driver is not None:
            found.update(self._driver.processes(target.leaf))
        if not found and target.root is not None and processes.look(target.root, self._proc_root) is not None:
            found.update(processes.descendants(target.root.pid, self._proc_root))
        return tuple(sorted(found))
