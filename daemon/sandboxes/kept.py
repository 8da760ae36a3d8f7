"""What is kept of each sandbox beside the State's fact of it: its cgroup, its agent's tag and pidfd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ...policies.model import CgroupId, ToolCallId
from .cgroups import SandboxCgroup
from .processes import ProcessRef


@dataclass(slots=True)
class Kept:
    """One sandbox as the keepers keep it."""

    cgroup: SandboxCgroup
    agent: ProcessRef | None = None
    """Its latest agent, gone or not; None: it has had none yet."""
    agent_tag: ToolCallId | None = None
    pidfd: int | None = None
    """Watches the agent while it lives."""
    announced: list[ToolCallId] = field(default_factory=list)
    """Hook calls that no process has been matched with yet, oldest first."""

    @property
    def agent_gone(self) -> bool:
        return self.agent is not None and self.pidfd is None


Book: TypeAlias = dict[CgroupId, Kept]
"""Shared by SandboxKeeper, which adds and removes, and ToolCallKeeper, which looks up."""
