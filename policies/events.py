"""Everything that can happen: past facts, each with the time at which it became true.

Owns the closed union `Event`. Sources emit them, `State.apply` is the only consumer that gives them meaning, and the
journal stores them. An Outcome is an event like any other.
Long for being the closed set, one class after the other: what a new kind of event adds here, it adds nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from .accounting import TurnCost
from .actions import Decision, Outcome
from .model import (
    AskedToolCall,
    CgroupId,
    CostModel,
    Engine,
    EngineId,
    EngineTotals,
    FinishReason,
    KvTier,
    ProcessRole,
    Sandbox,
    Session,
    SessionId,
    ToolCall,
    ToolCallId,
    ToolCallSource,
)
from .policy import Policy


@dataclass(frozen=True, slots=True)
class PolicyApplied:
    """A policy came into force; its tenants replace the known ones."""

    at_ns: int
    policy: Policy


@dataclass(frozen=True, slots=True)
class SandboxRegistered:
    at_ns: int
    sandbox: Sandbox


@dataclass(frozen=True, slots=True)
class SandboxRemoved:
    at_ns: int
    cgroup_id: CgroupId
    path: str = ""
    """Of its cgroup, for whoever must undo something there."""


@dataclass(frozen=True, slots=True)
class SandboxSampled:
    at_ns: int
    cgroup_id: CgroupId
    memory_bytes: int
    peak_bytes: int
    cpu_ns: int


@dataclass(frozen=True, slots=True)
class HostSampled:
    at_ns: int
    memory_total_bytes: int
    memory_available_bytes: int
    psi_some_ratio: float | None
    psi_full_ratio: float | None
    gpu_total_bytes: int | None = None
    gpu_used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A tool call begins: exec by an agent (lineage), a wrapper, or a hook."""

    at_ns: int
    id: ToolCallId
    sandbox: CgroupId
    """Of the sandbox that was registered, whichever leaf the process is in."""
    command: str
    """argv joined by blanks; may be cut short by the kernel's buffer."""
    source: ToolCallSource
    confidence: float
    pid: int | None = None
    session: SessionId | None = None
    """None: the sandbox's own."""
    soft_bytes: int = 0
    hard_bytes: int = 0
    session_leader: bool = False
    """It led a terminal session of its own (setsid) when it began."""
    group_leader: bool = False
    """Likewise a process group (setpgid)."""
    input_stamp: int = 0
    """Of the process that forked it: another number once that has been given more input. 0: not known."""
    agent: ToolCallId | None = None
    """The kernel's record of the process that forked it: the agent's runtime, its first program, a shell of it."""
    call_id: str | None = None
    """By which the conversation, and the agent's own log, know the call."""
    exempt: bool = False
    """No budget may stop it: it could be the agent."""
    earlier: ToolCall | None = None
    """It began under an earlier run of the daemon, which knew this of it: it goes on, and is no new call."""


@dataclass(frozen=True, slots=True)
class ConnectionOpened:
    """A TCP connection that a sandbox's agent or one of its tool calls opened is established."""

    at_ns: int
    sandbox: CgroupId
    id: ToolCallId
    """The tool call whose process called connect(), or the agent's own tag."""
    pid: int
    is_agent: bool
    local_address: str
    """As the other end sees it, unless something between them translates: "10.0.0.2", "::1"."""
    local_port: int
    remote_address: str
    remote_port: int
    network_namespace: int
    """Inode, as in /proc/PID/ns/net: the same address and port can exist in each."""


@dataclass(frozen=True, slots=True)
class RoleObserved:
    """A process below an agent is taken for something else than a tool call, or is gone."""

    at_ns: int
    process: ProcessRole


@dataclass(frozen=True, slots=True)
class ProcessExeced:
    """A process of a tool call became another program: its root (`env X=1 pytest`), or any where that is asked for."""

    at_ns: int
    id: ToolCallId
    pid: int
    command: str
    """As ToolCallStarted's."""


@dataclass(frozen=True, slots=True)
class ToolCallAttributed:
    """A known tool call is told more exactly what it is (a wrapper or a hook speaks after the kernel did)."""

    at_ns: int
    id: ToolCallId
    source: ToolCallSource
    confidence: float
    command: str | None = None
    session: SessionId | None = None
    call_id: str | None = None
    exempt: bool = False
    """It turned out to be an agent: no budget may stop it from now on."""


@dataclass(frozen=True, slots=True)
class ToolCallJoined:
    """One more process belongs to a call: the next program of a command line."""

    at_ns: int
    id: ToolCallId
    pid: int


@dataclass(frozen=True, slots=True)
class ToolCallLeft:
    """A process of a call is an agent of its own: whatever is done to the call is not done to it."""

    at_ns: int
    id: ToolCallId
    pid: int


@dataclass(frozen=True, slots=True)
class ToolCallWithdrawn:
    """What was told as a tool call is none: its conversation, heard after the kernel, asked for no such thing."""

    at_ns: int
    id: ToolCallId


@dataclass(frozen=True, slots=True)
class ToolCallMerged:
    """The calls `id` and `into` are one, known as `into` from now on.

    A hook announced `id` before the kernel saw `into`; or `id` is the wrapper that started `into`.
    """

    at_ns: int
    id: ToolCallId
    into: ToolCallId


@dataclass(frozen=True, slots=True)
class ToolCallMemoryStepped:
    """Its memory moved by a step since the last such event, or was sampled."""

    at_ns: int
    id: ToolCallId
    used_bytes: int
    peak_bytes: int


class BudgetLevel(Enum):
    SOFT = "soft"
    HARD = "hard"


@dataclass(frozen=True, slots=True)
class BudgetReached:
    """SOFT is a notice; at HARD the kernel has stopped `pid` already."""

    at_ns: int
    id: ToolCallId
    level: BudgetLevel
    budget_bytes: int
    used_bytes: int
    pid: int


@dataclass(frozen=True, slots=True)
class BudgetChanged:
    """New budgets; 0: none, and whoever stood at one goes on."""

    at_ns: int
    id: ToolCallId
    soft_bytes: int
    hard_bytes: int


@dataclass(frozen=True, slots=True)
class ToolCallEnded:
    """Its root process exited, or the hook said so. Exactly one of exit_code and signal is set where it is known."""

    at_ns: int
    id: ToolCallId
    exit_code: int | None
    signal: int | None
    escaped_count: int = 0
    peak_bytes: int | None = None
    """Resident memory of its processes, by lineage."""
    memcg_peak_bytes: int | None = None
    """High-water mark of its own memory cgroup, page cache included; None where it had none."""


@dataclass(frozen=True, slots=True)
class ProcessesGone:
    """The last process of a tool call, escapees included, has exited."""

    at_ns: int
    id: ToolCallId


@dataclass(frozen=True, slots=True)
class ToolCallFact(ABC):
    """What the kernel tells of a tool call beside its life and its memory: a class below for each kind of it.

    State keeps the newest of each class with the call, for people to see; a class that shall decide something has an
    arm of its own.
    """

    at_ns: int
    id: ToolCallId

    @property
    @abstractmethod
    def words(self) -> str:
        """What people are shown; one line."""


_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 6: "SIGABRT", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


@dataclass(frozen=True, slots=True)
class ToolCallSignalled(ToolCallFact):
    """A process of it was sent a signal that ends it unless it has a handler (SIGKILL, SIGTERM, SIGSEGV, ...)."""

    pid: int
    signal: int
    sender_pid: int
    sender_comm: str
    by_kernel: bool
    """An OOM kill, a fault of its own, a kernel thread: the sender is only who ran just then."""

    @property
    def words(self) -> str:
        name = _SIGNALS.get(self.signal, f"signal {self.signal}")
        sender = "the kernel, during " if self.by_kernel else ""
        return f"{name} to pid {self.pid} from {sender}{self.sender_comm} (pid {self.sender_pid})"


@dataclass(frozen=True, slots=True)
class IntentDeclared:
    """An agent says what its next tool call will need."""

    at_ns: int
    sandbox: CgroupId
    kind: str
    expected_bytes: int | None
    expected_ns: int | None


@dataclass(frozen=True, slots=True)
class EngineAttached:
    at_ns: int
    engine: Engine


@dataclass(frozen=True, slots=True)
class EngineDetached:
    at_ns: int
    engine: EngineId


@dataclass(frozen=True, slots=True)
class KvObserved:
    """The engine's full picture: a session not listed is gone from it."""

    at_ns: int
    engine: EngineId
    sessions: tuple[Session, ...]
    device_used_tokens: int
    host_used_bytes: int
    disk_used_bytes: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    running_count: int
    waiting_count: int
    totals: EngineTotals
    cost: CostModel | None = None


@dataclass(frozen=True, slots=True)
class TurnStarted:
    at_ns: int
    engine: EngineId
    session: SessionId
    turn: str
    prompt_tokens: int
    cached_tokens: int
    peer_port: int | None = None
    peer_address: str | None = None


@dataclass(frozen=True, slots=True)
class SessionJoined:
    """A turn of the session came from a sandbox, as its connection shows."""

    at_ns: int
    engine: EngineId
    session: SessionId
    sandbox: CgroupId


@dataclass(frozen=True, slots=True)
class TurnEnded:
    at_ns: int
    engine: EngineId
    session: SessionId
    turn: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    output_tokens: int
    ttft_ns: int
    queued_ns: int
    cost: TurnCost = field(default_factory=TurnCost)
    asked: tuple[AskedToolCall, ...] = ()
    """The tool calls that the answer asks for, where the engine looks for them."""


@dataclass(frozen=True, slots=True)
class SessionMoved:
    at_ns: int
    engine: EngineId
    session: SessionId
    from_tier: KvTier
    to_tier: KvTier
    tokens: int
    moved_bytes: int
    duration_ns: int
    directive: str | None


@dataclass(frozen=True, slots=True)
class TurnPreempted:
    at_ns: int
    engine: EngineId
    session: SessionId
    turn: str
    to_tier: KvTier
    directive: str | None


@dataclass(frozen=True, slots=True)
class DecisionMade:
    at_ns: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class OutcomeObserved:
    at_ns: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class EventsLost:
    """Events that will never come: a full ring buffer, a full queue."""

    at_ns: int
    source: str
    count: int


Event = (
    SandboxRegistered
    | SandboxRemoved
    | SandboxSampled
    | HostSampled
    | ToolCallStarted
    | ConnectionOpened
    | RoleObserved
    | ProcessExeced
    | ToolCallAttributed
    | ToolCallJoined
    | ToolCallLeft
    | ToolCallWithdrawn
    | ToolCallMerged
    | PolicyApplied
    | ToolCallMemoryStepped
    | BudgetReached
    | BudgetChanged
    | ToolCallEnded
    | ProcessesGone
    | ToolCallSignalled
    | IntentDeclared
    | EngineAttached
    | EngineDetached
    | KvObserved
    | TurnStarted
    | SessionJoined
    | TurnEnded
    | SessionMoved
    | TurnPreempted
    | DecisionMade
    | OutcomeObserved
    | EventsLost
)
