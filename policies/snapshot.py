"""The picture a policy decides on: everything known, at one instant, frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

from .estimate import Estimates
from .model import Engine, EngineId, Host, ProcessRole, Sandbox, Session, SessionId, Tenant, TenantId, ToolCall
from .policy import LadderRule


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the policy may look at. Each tuple is sorted by id."""

    now_ns: int
    host: Host = field(default_factory=Host)
    tenants: tuple[Tenant, ...] = ()
    sandboxes: tuple[Sandbox, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    """Those that run, or whose processes are not all gone, or that ended within the last minute."""
    processes: tuple[ProcessRole, ...] = ()
    """What runs below the agents and is no tool call. No decision looks at it."""
    sessions: tuple[Session, ...] = ()
    engines: tuple[Engine, ...] = ()
    estimates: Estimates = field(default_factory=Estimates)
    pressed: tuple[tuple[LadderRule, int], ...] = ()
    """The rules of the ladder that press, each with the time since when."""
    weights_told: frozenset[tuple[EngineId, TenantId, float]] = frozenset()
    """Tenant weights the engines have been asked to use."""

    left_behind: frozenset[SessionId] = frozenset()
    """Sessions whose sandbox has been removed: no agent will come back for their KV."""

    def weight(self, tenant: TenantId) -> float:
        return next((t.weight for t in self.tenants if t.id == tenant), 1.0)

    def engine(self, engine: EngineId) -> Engine | None:
        return next((e for e in self.engines if e.id == engine), None)

    def running_call_of(self, session: SessionId) -> ToolCall | None:
        """The session's longest-running tool call, or None."""
        calls = [c for c in self.tool_calls if c.session == session and c.running]
        return min(calls, key=lambda c: c.start_ns) if calls else None

    def tool_used_bytes(self) -> int:
        """RAM used by all tool calls, escapees included."""
        return sum(c.used_bytes for c in self.tool_calls if c.gone_ns is None)
