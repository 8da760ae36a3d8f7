"""What is kept of each sandbox beside the State's fact of it: its cgroup, its agent's tag and pidfd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ...policies.model import NS_PER_S, CgroupId, ToolCallId
from ...policies.roles import Profile
from .cgroups import SandboxCgroup
from .conversations import Conversations
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
    direct: bool = False
    """The registered process is the agent itself, not what may start it: so the caller said."""
    runtimes: dict[ToolCallId, int] = field(default_factory=dict)
    """Who speaks to a model, by the record that their children's calls name as their parent; the process."""
    shells: dict[ToolCallId, int] = field(default_factory=dict)
    """Persistent shells likewise: each command in one is a tool call."""
    profile: Profile | None = None
    """Of the runtime, where the agent is known."""
    survey_due_ns: int = 0
    """When to look for a runtime among its processes again, should no event tell of one ..."""
    survey_pause_ns: int = NS_PER_S
    """... and how long to leave it after that: twice as long each time."""
    conversations: Conversations = field(default_factory=Conversations)
    announced: list[ToolCallId] = field(default_factory=list)
    """Hook calls that no process has been matched with yet, oldest first."""

    @property
    def agent_gone(self) -> bool:
        return self.agent is not None and self.pidfd is None

    @property
    def agent_pid(self) -> int | None:
        """Its first program, as it was registered."""
        return self.agent.pid if self.agent is not None else None

    def tags(self) -> set[ToolCallId]:
        """Every record in the kernel that calls of this sandbox name as their parent."""
        return {*self.runtimes, *self.shells, *([self.agent_tag] if self.agent_tag is not None else [])}


Book: TypeAlias = dict[CgroupId, Kept]
"""Shared by SandboxKeeper, which adds and removes, and ToolCallKeeper, which looks up."""
