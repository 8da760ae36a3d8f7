"""The policy in force, as typed values with their defaults. `document/` makes one from a YAML mapping."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from .model import MIB, NS_PER_S, Host, KvTier, RoleRule, Tenant, TenantId, ToolCall, ToolCallSource


class Mode(Enum):
    """How far a policy goes."""

    OBSERVE = "observe"
    """What happens is measured; nothing is decided."""
    DRY_RUN = "dry-run"
    """Everything is decided and listed, budgets' stops included; nothing is carried out."""
    ENFORCE = "enforce"


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory a tool call may use before anybody is asked. Invariant: 0 < soft <= hard."""

    soft_bytes: int
    """A notice is logged."""
    hard_bytes: int
    """The kernel stops the call and the policy is asked."""


@dataclass(frozen=True, slots=True)
class CallClass:
    """Tool calls that something holds for, whoever makes them. Of what it matches by, None matches every call."""

    name: str
    command: str | None = None
    """A regular expression, looked for in the command line."""
    tool: str | None = None
    """The program that does the work: `pytest`, `cc`."""
    source: ToolCallSource | None = None
    tenant: TenantId | None = None
    budget: Budget | None = None
    """None: what others have."""
    wait_ns: int | None = None
    """How long it waits for memory when stopped; None: as long as others."""

    def matches(self, call: ToolCall) -> bool:
        return (
            (self.tool is None or self.tool == call.kind)
            and (self.source is None or self.source is call.source)
            and (self.tenant is None or self.tenant == call.tenant)
            and (self.command is None or re.search(self.command, call.command) is not None)
        )


class Measure(Enum):
    """What a rule of the ladder looks at; each is a ratio."""

    TOOL_POOL = "tool pool"
    """What tool calls use of the pool that they share."""
    HOST_MEMORY = "host memory"
    """What is used of the host's RAM, by whomever."""
    MEMORY_PRESSURE = "memory pressure"
    """Share of the last 10 s in which some task of the host waited for memory (PSI some)."""

    @property
    def unit(self) -> str:
        return {"tool pool": "of the pool", "host memory": "of the host's RAM"}.get(self.value, "of the time")

    def of(self, tool_used_bytes: int, pool_bytes: int, host: Host) -> float | None:
        """None: not known."""
        match self:
            case Measure.TOOL_POOL:
                return tool_used_bytes / pool_bytes if pool_bytes else None
            case Measure.HOST_MEMORY:
                return host.used_ratio if host.memory_total_bytes else None
            case Measure.MEMORY_PRESSURE:
                return host.psi_some_ratio


class Rung(Enum):
    """What a rule of the ladder does to one call at a time."""

    THROTTLE = "throttle"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True)
class LadderRule:
    """When calls are held back. Invariant: 0 < above <= 1, below <= above."""

    measure: Measure = Measure.TOOL_POOL
    above_ratio: float = 0.9
    for_ns: int = 2 * NS_PER_S
    """So long it must have lasted."""
    below_ratio: float = 0.8
    """It lasts until below this: then calls are let go before their time."""
    rung: Rung = Rung.THROTTLE
    cpu_ratio: float = 0.2
    """Of a throttle: of one CPU, where memory.high does not exist."""
    lasting_ns: int = 5 * NS_PER_S
    """It undoes itself after this."""

    @property
    def words(self) -> str:
        return f"{self.measure.value} above {self.above_ratio:.2f} for {self.for_ns / NS_PER_S:g}s"


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """How host RAM is shared among tool calls."""

    tool_pool_bytes: int | None = None
    """RAM all tool calls may use together; None: tool_pool_ratio of the host's RAM."""
    tool_pool_ratio: float = 0.6
    budget: Budget = Budget(384 * MIB, 512 * MIB)
    kind_budgets: tuple[tuple[str, Budget], ...] = ()
    """Budgets for single kinds of command (`pytest`), instead of `budget`."""
    max_bytes: int = 4096 * MIB
    """The largest hard budget a tool call may be granted; at it a call is ended."""
    bends: bool = True
    """It is granted more all the same while nobody else needs the memory."""
    step_bytes: int = 256 * MIB
    """What one grant adds."""
    wait_ns: int = 20 * NS_PER_S
    """How long a stopped call waits for memory before it is ended."""
    ladder: tuple[LadderRule, ...] = (LadderRule(),)
    """Each rule holds back one call at a time while it presses."""

    def budget_for(self, kind: str) -> Budget:
        return dict(self.kind_budgets).get(kind, self.budget)

    def pool_bytes(self, memory_total_bytes: int) -> int:
        if self.tool_pool_bytes is not None:
            return self.tool_pool_bytes
        return int(self.tool_pool_ratio * memory_total_bytes)


class KvPart(Enum):
    """A part of the economy that a what-if can take out, to see what it is worth. No policy document does."""

    MARGINAL = "marginal"
    """Decisions are made one at a time, each on books updated by the one before; without it at one set of prices."""
    NEED = "need"
    """A byte that nobody asks for costs nothing; without it rent rises from an empty tier on."""
    COPIES = "copies"
    """What a lower tier holds already is not counted as to be written again."""
    RAISE = "raise"
    """What waits in a lower tier may wait on the device instead, where that has room and RAM is dear."""


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """How the KV of sessions in tool calls is treated."""

    decide_after_ns: int = NS_PER_S // 4
    """Tool calls shorter than this never cause a decision."""
    dwell_ns: int = 2 * NS_PER_S
    """Least time between two verdicts on one session."""
    hysteresis_ratio: float = 0.2
    """A new verdict must be cheaper than the one in force by this share."""
    retain_ns: int = 10 * NS_PER_S
    """Longest retention asked of the engine at a time."""
    directive_ns: int = 5 * NS_PER_S
    """A directive not applied after this is void."""
    door_ratio: float | None = None
    """Of device and host tier together that the sessions awake may need; None: everybody is."""
    door_longest_ns: int = 120 * NS_PER_S
    """Nobody is held at the door for longer than this after asking."""
    without: frozenset[KvPart] = frozenset()
    tiers: frozenset[KvTier] = frozenset({KvTier.HOST, KvTier.DISK})
    """Where KV may be moved to, of what the engine has."""


@dataclass(frozen=True, slots=True)
class Policy:
    name: str = "default"
    mode: Mode = Mode.ENFORCE
    tenants: tuple[Tenant, ...] = (Tenant(TenantId("default")),)
    tenant_budgets: tuple[tuple[TenantId, Budget], ...] = ()
    """What the calls of single tenants may use, instead of `memory.budget`."""
    classes: tuple[CallClass, ...] = ()
    """The first that matches and says something counts."""
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    kv: KvPolicy = field(default_factory=KvPolicy)
    roles: tuple[RoleRule, ...] = ()
    """What commands are, by the operator's own word; the first that matches counts."""

    @property
    def enforce(self) -> bool:
        """Whether what is decided is done; else no call has a budget in the kernel: nobody would answer it."""
        return self.mode is Mode.ENFORCE

    def budget_for(self, call: ToolCall) -> Budget:
        """By its class, else by its kind, else by its tenant."""
        found = next((c.budget for c in self.classes if c.budget is not None and c.matches(call)), None)
        kind, tenant = dict(self.memory.kind_budgets).get(call.kind), dict(self.tenant_budgets).get(call.tenant)
        return found or kind or tenant or self.memory.budget

    def wait_ns_for(self, call: ToolCall) -> int:
        """How long it waits for memory when stopped, by its class."""
        found = (c.wait_ns for c in self.classes if c.wait_ns is not None and c.matches(call))
        return next(found, self.memory.wait_ns)
