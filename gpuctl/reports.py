"""What an engine tells whoever watches: past facts, one dataclass each.

Owns: the closed set of reports, in the core's words. Every engine adapter makes them, client.py sends them. Must not:
import gRPC, or know any one engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..policies.accounting import TurnCost
from ..policies.model import (
    AskedToolCall,
    CostModel,
    EngineTotals,
    FinishReason,
    KvTier,
    SessionId,
    SessionPhase,
    TenantId,
    TurnId,
)
from .directives import DirectiveBase, Outcome


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Who the engine is; stable for its life."""

    engine_id: str
    """Unique on the host, stable for the life of its process."""
    kind: str
    """What engine it is: "embedded", "vllm"."""
    model: str
    pid: int
    bytes_per_token: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    disk_capacity_bytes: int
    cost: CostModel
    directives: frozenset[type[DirectiveBase]]
    """What it can apply; the rest is answered for it, and never reaches it."""
    listen_addresses: tuple[str, ...] = ()
    """Where it serves, as bound: "127.0.0.1:8800", "[::1]:8800". Empty: not told."""


@dataclass(frozen=True, slots=True)
class SessionKv:
    session_id: SessionId
    tenant_id: TenantId
    phase: SessionPhase
    tier: KvTier
    held_tokens: int
    context_tokens: int
    host_bytes: int
    disk_bytes: int
    retain_until_ns: int | None
    shared_tokens: int = 0
    charged_tokens: float = 0.0
    """Device cells it answers for: a cell with n users counts 1/n for each. All sessions' add up to what is used."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier below the device, by the engine's own name for it."""

    tier: str
    used_bytes: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The full picture: a session not listed is gone. `host` and `disk`: all tiers whose memory is of that kind."""

    sessions: tuple[SessionKv, ...]
    device_used_tokens: int
    host_used_bytes: int
    disk_used_bytes: int
    running_count: int
    waiting_count: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    totals: EngineTotals
    cost: CostModel
    tiers: tuple[TierUse, ...] = ()
    """From the nearest down. For the engine's own metrics: the daemon weighs kinds of memory."""


@dataclass(frozen=True, slots=True)
class TurnStarted:
    session_id: SessionId
    tenant_id: TenantId
    turn_id: TurnId
    prompt_tokens: int
    cached_tokens: int
    peer_port: int | None
    peer_address: str | None = None


@dataclass(frozen=True, slots=True)
class PeerSeen:
    """A client has connected: who is it? True since its connection was accepted."""

    peer_address: str
    peer_port: int


@dataclass(frozen=True, slots=True)
class TurnEnded:
    session_id: SessionId
    tenant_id: TenantId
    turn_id: TurnId
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    output_tokens: int
    ttft_ns: int | None
    queued_ns: int
    cost: TurnCost
    asked: tuple[AskedToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionMoved:
    session_id: SessionId
    tenant_id: TenantId
    from_tier: KvTier
    to_tier: KvTier
    tokens: int
    moved_bytes: int
    duration_ns: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class TurnPreempted:
    session_id: SessionId
    tenant_id: TenantId
    turn_id: TurnId
    to_tier: KvTier
    directive_id: str = ""


Report = Occupancy | TurnStarted | PeerSeen | TurnEnded | SessionMoved | TurnPreempted | Outcome


@dataclass(frozen=True, slots=True)
class Reported:
    """A report and when it became true (CLOCK_MONOTONIC)."""

    at_ns: int
    report: Report


Listener = Callable[[Reported], None]
"""Called with each report, in order; must not block."""
