"""The facts Equipoise reasons about: tenants, sandboxes, tool calls, sessions and the KV they hold.

Owns the vocabulary. Everything here is a frozen value; it has no behaviour beyond arithmetic on its own fields and
knows nothing of where a fact came from. Times are CLOCK_MONOTONIC nanoseconds of one host. Long for being all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from .accounting import SessionCost

TenantId = NewType("TenantId", str)
CgroupId = NewType("CgroupId", int)
"""A cgroup's id in the v2 hierarchy: the inode of its directory. It names a sandbox on either layout."""
ToolCallId = NewType("ToolCallId", int)
"""64 bits, the tag the kernel carries in task storage; 0 is never a tool call."""
SessionId = NewType("SessionId", str)
TurnId = NewType("TurnId", str)
EngineId = NewType("EngineId", str)
DecisionId = NewType("DecisionId", str)

NS_PER_S = 1_000_000_000
MIB = 1 << 20


def tenants_session(tenant: TenantId, named: str) -> SessionId:
    """The session that a tenant means by a name: "private" of gold is "gold/private", and stays so when said again.

    Every name of one tenant differs from every name of another, so that nobody can take another's before he does.
    """
    return SessionId(named if named.startswith(f"{tenant}/") else f"{tenant}/{named}")


class ToolCallSource(Enum):
    """How a tool call's boundaries were found."""

    HOOK = "hook"
    """The agent said so (BeginToolCall / EndToolCall)."""
    WRAPPER = "wrapper"
    """It runs under `equipoise tool -- CMD`."""
    LINEAGE = "lineage"
    """The kernel saw the agent exec it."""


class ToolCallPhase(Enum):
    """What a tool call is doing, as far as our own actions go."""

    RUNNING = "running"
    THROTTLED = "throttled"
    FROZEN = "frozen"
    STOPPED = "stopped"
    """Stopped in the kernel at its hard budget; it waits for a grant or its end."""
    KILLED = "killed"
    """We ended it; its end is still to be seen."""
    ENDED = "ended"


STALLED = frozenset({ToolCallPhase.STOPPED, ToolCallPhase.FROZEN, ToolCallPhase.THROTTLED})
"""Phases in which we hold a call back."""


class KvTier(Enum):
    """Where KV is held."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"
    """Dropped: the next turn computes it again."""


class SessionPhase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    IDLE = "idle"
    HELD = "held"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    ERROR = "error"


class Verdict(Enum):
    """What to do with the KV of a session whose agent is in a tool call."""

    KEEP = "keep"
    SWAP_HOST = "swap"
    SWAP_DISK = "swap-disk"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class AskedToolCall:
    """A tool call as the model asked for it."""

    call_id: str
    """By which the conversation knows it."""
    name: str
    command: str = ""
    """What a shell is to run; empty: its arguments hold no command."""


class Role(Enum):
    """What a process below an agent is taken for; roles.py has the rules."""

    RUNTIME = "runtime"
    """It speaks to the model: never stopped or ended for a tool call's budget."""
    START_UP = "start-up"
    """From before anybody spoke to a model: it may still become the runtime."""
    HOUSEKEEPING = "housekeeping"
    """The runtime's own (git, rg, ps): counted to the sandbox, no wait."""
    TOOL_CALL = "tool call"
    SHELL = "shell"
    """Fed line by line: part of the runtime, each command in it is a tool call."""
    SERVICE = "service"
    """A child that stays: counted to the sandbox, never a wait."""
    WRAPPER = "wrapper"
    """A program of ours around a call."""


@dataclass(frozen=True, slots=True)
class ProcessRole:
    """A process below an agent that is no tool call."""

    id: ToolCallId
    """Of its record in the kernel."""
    sandbox: CgroupId
    pid: int
    command: str
    role: Role
    confidence: float
    """0..1."""
    why: str
    since_ns: int
    gone: bool = False


@dataclass(frozen=True, slots=True)
class RoleRule:
    """A policy's own word on what a command is."""

    match: str
    """A regular expression, looked for in the command line."""
    role: Role


@dataclass(frozen=True, slots=True)
class Tenant:
    id: TenantId
    weight: float = 1.0
    """Share under contention relative to the others; above 0."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A cgroup in which one agent and its tool calls live."""

    cgroup_id: CgroupId
    tenant: TenantId
    name: str
    path: str
    """Relative to the root of the hierarchy, without a leading slash."""
    session: SessionId
    """The session its agent uses unless it says otherwise."""
    agent_pid: int | None
    registered_ns: int
    agent_start_ticks: int | None = None
    """With its pid the agent's identity for one boot: field 22 of /proc/<pid>/stat. None: no agent, or not known."""
    direct: bool = False
    """The registered process is the agent itself and no launcher of it: whatever it starts is a tool call."""
    memory_bytes: int = 0
    """Charged to the whole cgroup at the last sample."""
    peak_bytes: int = 0
    cpu_ns: int = 0

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class KvMeanwhile:
    """The KV a session held while one of its tool calls ran."""

    held_bytes: int = 0
    """The most it held, in any tier, during the call."""
    idle_byte_seconds: float = 0.0
    """Integral of the bytes held on the device while no turn of the session ran."""
    host_byte_seconds: float = 0.0
    """The same for host RAM: what the swap tier paid."""
    at_peak_bytes: int = 0
    """Held, in any tier, when the tool call's memory peaked."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that the kernel told of a tool call (events.ToolCallFact)."""

    kind: str
    """Name of the event's class."""
    at_ns: int
    words: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The tasks that descend from one exec by the agent.

    Invariants: `peak_bytes >= used_bytes`; `end_ns` is set exactly when the phase is ENDED; `end_ns >= start_ns`.
    """

    id: ToolCallId
    tenant: TenantId
    sandbox: CgroupId
    session: SessionId
    command: str
    kind: str
    """The program that does the work (`pytest`, `cc`, `git`): the key of every estimate."""
    source: ToolCallSource
    confidence: float
    """0..1: that these tasks are one tool call with these boundaries."""
    start_ns: int
    pid: int | None = None
    end_ns: int | None = None
    phase: ToolCallPhase = ToolCallPhase.RUNNING
    phase_since_ns: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0
    peak_ns: int = 0
    soft_bytes: int = 0
    hard_bytes: int = 0
    """0: no budget."""
    overshoot_bytes: int | None = None
    """Most by which it stood above a hard budget when the kernel stopped it; None: never stopped."""
    stalled_ns: int = 0
    """Time it spent stopped, frozen or throttled by us, without the current stretch."""
    exit_code: int | None = None
    signal: int | None = None
    escaped_count: int = 0
    """Processes that outlived the call's root process."""
    gone_ns: int | None = None
    """When the last of its processes ended."""
    kv: KvMeanwhile = field(default_factory=KvMeanwhile)
    verdict: Verdict | None = None
    stopped_ns: int | None = None
    """Since when the kernel holds processes of it stopped at its hard budget. Its phase says STOPPED while it runs;
    an escapee can be stopped after the call has ended, and is answered all the same."""
    granted_ns: int | None = None
    """When it was last granted more; None: never."""
    waiting_until_ns: int | None = None
    """Stopped at its budget and told to wait, at most until then."""
    expected_bytes: int | None = None
    """Declared by the agent, or None."""
    expected_ns: int | None = None
    agent: ToolCallId | None = None
    """The kernel's record of the process that forked it; None: it was not found by lineage."""
    call_id: str | None = None
    """By which the conversation, and the agent's own log, know the call."""
    exempt: bool = False
    """No budget may stop it, and nothing holds it back: it could be the agent."""
    facts: tuple[Fact, ...] = ()
    """The newest of each kind, oldest first."""

    @property
    def running(self) -> bool:
        return self.end_ns is None

    def elapsed_ns(self, now_ns: int) -> int:
        return max(0, (self.end_ns if self.end_ns is not None else now_ns) - self.start_ns)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Speeds fitted on this machine; 0 where not measured."""

    prefill_seconds_per_token: float = 0.0
    prefill_seconds_per_token2: float = 0.0
    decode_step_seconds: float = 0.0
    decode_seconds_per_sequence: float = 0.0
    host_bytes_per_second: float = 0.0
    disk_bytes_per_second: float = 0.0

    def prefill_seconds(self, tokens: int, held_tokens: int = 0) -> float:
        """Seconds to compute, alone, a prompt of `tokens` of which the first `held_tokens` are held."""
        pairs = tokens * tokens - held_tokens * held_tokens
        return self.prefill_seconds_per_token * (tokens - held_tokens) + self.prefill_seconds_per_token2 * pairs


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Running totals since the engine started."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    swap_out_count: int = 0
    swap_out_bytes: int = 0
    swap_out_ns: int = 0
    swap_in_count: int = 0
    swap_in_bytes: int = 0
    swap_in_ns: int = 0
    preempted_count: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving engine that is, or was, attached."""

    id: EngineId
    kind: str
    model: str
    pid: int
    bytes_per_token: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    disk_capacity_bytes: int
    cost: CostModel
    supported_directives: frozenset[str]
    attached: bool = True
    device_used_tokens: int = 0
    host_used_bytes: int = 0
    disk_used_bytes: int = 0
    running_count: int = 0
    waiting_count: int = 0
    totals: EngineTotals = field(default_factory=EngineTotals)
    observed_ns: int = 0
    listen_addresses: tuple[str, ...] = ()
    """Where it serves, as bound: "127.0.0.1:8800", "[::1]:8800". Empty: not told."""

    @property
    def device_used_ratio(self) -> float:
        return self.device_used_tokens / self.device_capacity_tokens if self.device_capacity_tokens else 0.0

    def listens_at(self, address: str, port: int) -> bool:
        """Whether a connection to this address leads to it. False where it does not say where it listens."""
        for listening in self.listen_addresses:
            host, _, at = listening.rpartition(":")
            if at == str(port) and (host in ("", "*", "0.0.0.0", "[::]") or host.strip("[]") == address):
                return True
        return False


@dataclass(frozen=True, slots=True)
class Session:
    """One agent conversation in an engine, and the KV it holds."""

    id: SessionId
    tenant: TenantId
    engine: EngineId
    phase: SessionPhase
    tier: KvTier
    held_tokens: int
    context_tokens: int
    host_bytes: int = 0
    disk_bytes: int = 0
    retain_until_ns: int = 0
    shared_tokens: int = 0
    observed_ns: int = 0
    last_finish: FinishReason | None = None
    turn_count: int = 0
    verdict: Verdict | None = None
    """What was last asked of the engine for this session."""
    verdict_ns: int = 0
    cost: SessionCost = field(default_factory=SessionCost)
    """Of its turns that ended while this daemon and the engine knew each other."""
    asked_ns: int = 0
    """When its last turn was asked for; 0: not seen."""
    hold_until_ns: int = 0
    """Until when the engine was told to hold it; 0, or past: it is not held by us."""
    sandbox: CgroupId | None = None
    """Where its requests come from, as their connections show; None: not known."""

    def device_tokens(self) -> int:
        return self.held_tokens if self.tier is KvTier.DEVICE else 0


@dataclass(frozen=True, slots=True)
class Host:
    """Memory of the machine and its pressure."""

    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    psi_some_ratio: float | None = None
    """Share of the last 10 s in which some task waited for memory; None: PSI is not available."""
    psi_full_ratio: float | None = None
    gpu_total_bytes: int | None = None
    """None: no GPU was found."""
    gpu_used_bytes: int | None = None
    observed_ns: int = 0

    @property
    def used_ratio(self) -> float:
        if not self.memory_total_bytes:
            return 0.0
        return 1.0 - self.memory_available_bytes / self.memory_total_bytes
