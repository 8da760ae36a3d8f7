"""What can be done, why it was chosen, and what came of it.

Owns the closed union `Action`. Every action that holds something back carries the time at which it undoes itself;
only a kill and a grant are final. Each on a tool call has its own `words`: what is done, without its subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .model import MIB, DecisionId, EngineId, KvTier, SessionId, TenantId, ToolCallId


@dataclass(frozen=True, slots=True)
class Throttle:
    """Slow a tool call down: memory.high on v2; on v1, which has nothing like it, a CPU quota."""

    tool_call: ToolCallId
    high_bytes: int
    cpu_ratio: float
    """Of one CPU; used where memory.high does not exist."""
    expires_ns: int

    @property
    def words(self) -> str:
        return "throttle"


@dataclass(frozen=True, slots=True)
class Freeze:
    tool_call: ToolCallId
    expires_ns: int

    @property
    def words(self) -> str:
        return "freeze"


@dataclass(frozen=True, slots=True)
class Thaw:
    """Undo what a decision holds back (a throttle, a freeze) before it expires; not a stop at the budget."""

    tool_call: ToolCallId

    @property
    def words(self) -> str:
        return "let go"


@dataclass(frozen=True, slots=True)
class Grant:
    """Raise a tool call's budgets and, where it was stopped at one, let it go on."""

    tool_call: ToolCallId
    soft_bytes: int
    hard_bytes: int

    @property
    def words(self) -> str:
        return f"grant {self.hard_bytes / MIB:.0f} MiB"


@dataclass(frozen=True, slots=True)
class Wait:
    """Leave a tool call stopped at its budget until memory is free, at most until expires_ns."""

    tool_call: ToolCallId
    needed_bytes: int
    expires_ns: int

    @property
    def words(self) -> str:
        return "wait for memory"


@dataclass(frozen=True, slots=True)
class Kill:
    """End a tool call: its whole subtree, never the agent's runtime."""

    tool_call: ToolCallId
    message: str
    """One line for the agent: cause, peak, budget, suggestion."""

    @property
    def words(self) -> str:
        return "kill the tool call"


@dataclass(frozen=True, slots=True)
class SwapOut:
    engine: EngineId
    session: SessionId
    tier: KvTier
    expires_ns: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    engine: EngineId
    session: SessionId
    expires_ns: int


@dataclass(frozen=True, slots=True)
class Retain:
    engine: EngineId
    session: SessionId
    ttl_ns: int
    expires_ns: int


@dataclass(frozen=True, slots=True)
class Drop:
    engine: EngineId
    session: SessionId
    from_token: int
    expires_ns: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Do not compute a session's next turn, at most for ttl_ns; what it holds stays where it is."""

    engine: EngineId
    session: SessionId
    ttl_ns: int
    expires_ns: int


@dataclass(frozen=True, slots=True)
class Release:
    """End a hold before its time."""

    engine: EngineId
    session: SessionId
    expires_ns: int


@dataclass(frozen=True, slots=True)
class SetTenantWeight:
    engine: EngineId
    tenant: TenantId
    weight: float
    expires_ns: int


@dataclass(frozen=True, slots=True)
class SetHostTierCapacity:
    engine: EngineId
    host_bytes: int
    expires_ns: int


ToolCallAction = Throttle | Freeze | Thaw | Grant | Wait | Kill
EngineAction = SwapOut | SwapIn | Retain | Drop | Hold | Release | SetTenantWeight | SetHostTierCapacity
Action = ToolCallAction | EngineAction


@dataclass(frozen=True, slots=True)
class Candidate:
    """One alternative that was weighed."""

    name: str
    cost: float
    """In the unit that the decision's evidence names; lower is better."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One action and why. `candidates` is sorted, the chosen one first."""

    id: DecisionId
    at_ns: int
    rule: str
    """Reads as a claim: "tool pool above 0.90 for 2s"."""
    measurement: float
    threshold: float
    unit: str
    action: Action
    tenant: TenantId
    subject: str
    """Who it is about, for people: "gold/ada pytest"."""
    evidence: str
    """One sentence with the figures."""
    candidates: tuple[Candidate, ...] = ()
    trigger_ns: int | None = None
    """When the fact that called for it became true; None: it was not one event."""


class OutcomeStatus(Enum):
    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    COMPLETED = "completed"
    EXPIRED = "expired"
    """Its own expiry undid it, or its deadline passed."""
    GONE = "gone"
    """The process, cgroup, session or engine vanished first."""
    FAILED = "failed"
    DRY_RUN = "dry-run"


@dataclass(frozen=True, slots=True)
class Outcome:
    decision: DecisionId
    status: OutcomeStatus
    at_ns: int
    tier: str
    """Who enforced it: "cgroup-v2 memory.high", "signal", "engine embedded", ..."""
    detail: str = ""
    latency_ns: int | None = None
    """From the decision's trigger (or the decision) to the effect."""
