"""What a daemon may ask of an engine, and what the engine answers: the engine hook without its wire format.

Owns: the closed set of directives and outcomes. Must not: import gRPC (client.py translates), or act (the engine does).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import get_args

from ..policies.model import KvTier, SessionId, TenantId


class OutcomeStatus(enum.Enum):
    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    COMPLETED = "completed"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        return self not in (OutcomeStatus.ACCEPTED, OutcomeStatus.DEFERRED)


@dataclass(frozen=True, slots=True)
class Outcome:
    directive_id: str
    status: OutcomeStatus
    reason: str = ""


class PreemptMode(enum.Enum):
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectiveBase:
    directive_id: str
    deadline_ns: int
    """CLOCK_MONOTONIC; not applied after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTenantWeight(DirectiveBase):
    tenant_id: TenantId
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(DirectiveBase):
    session_id: SessionId
    ttl_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(DirectiveBase):
    session_id: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempt(DirectiveBase):
    session_id: SessionId
    mode: PreemptMode


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOut(DirectiveBase):
    session_id: SessionId
    tier: KvTier


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapIn(DirectiveBase):
    session_id: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Retain(DirectiveBase):
    session_id: SessionId
    ttl_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(DirectiveBase):
    session_id: SessionId
    from_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCapacity(DirectiveBase):
    device_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetHostTierCapacity(DirectiveBase):
    host_bytes: int


Directive = (
    SetTenantWeight | Hold | Release | Preempt | SwapOut | SwapIn | Retain | Drop | SetCapacity | SetHostTierCapacity
)
DIRECTIVES: frozenset[type[DirectiveBase]] = frozenset(get_args(Directive))
