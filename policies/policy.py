"""The policy in force, as typed values with their defaults. `document.py` makes one from a YAML mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .model import MIB, NS_PER_S, RoleRule, Tenant, TenantId


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory a tool call may use before anybody is asked. Invariant: 0 < soft <= hard."""

    soft_bytes: int
    """A notice is logged."""
    hard_bytes: int
    """The kernel stops the call and the policy is asked."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """How host RAM is shared among tool calls. Invariant: 0 < pressure_above <= 1, pressure_below <= pressure_above."""

    tool_pool_bytes: int | None = None
    """RAM all tool calls may use together; None: tool_pool_ratio of the host's RAM."""
    tool_pool_ratio: float = 0.6
    budget: Budget = Budget(384 * MIB, 512 * MIB)
    kind_budgets: tuple[tuple[str, Budget], ...] = ()
    """Budgets for single kinds of command (`pytest`), instead of `budget`."""
    max_bytes: int = 4096 * MIB
    """The largest hard budget a tool call may be granted; at it a call is ended."""
    step_bytes: int = 256 * MIB
    """What one grant adds."""
    wait_ns: int = 20 * NS_PER_S
    """How long a stopped call waits for memory before it is ended."""
    pressure_above_ratio: float = 0.9
    """Of the pool: above this for `pressure_for_ns`, calls are throttled."""
    pressure_below_ratio: float = 0.8
    """Below this, throttled calls are let go before their time."""
    pressure_for_ns: int = 2 * NS_PER_S
    throttle_cpu_ratio: float = 0.2
    """Of one CPU, where memory.high does not exist."""
    throttle_ns: int = 5 * NS_PER_S
    """A throttle undoes itself after this."""

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


@dataclass(frozen=True, slots=True)
class Policy:
    name: str = "default"
    enforce: bool = True
    """False: decisions are made and journalled, nothing is done."""
    tenants: tuple[Tenant, ...] = (Tenant(TenantId("default")),)
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    kv: KvPolicy = field(default_factory=KvPolicy)
    roles: tuple[RoleRule, ...] = ()
    """What commands are, by the operator's own word; the first that matches counts."""
