"""What the journal answers with, where the model has no word for it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ....policies.accounting import TurnCost
from ....policies.model import EngineId, FinishReason, SessionId, TenantId


class Series(Enum):
    """What a sample measures. `key` is the sandbox's label, or the tier."""

    SANDBOX_MEMORY = "sandbox_memory"
    KV = "kv"


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of the timeline."""

    at_ns: int
    series: Series
    tenant: TenantId
    key: str
    value_bytes: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a session: as started, and as ended where it has."""

    engine: EngineId
    session: SessionId
    turn: str
    prompt_tokens: int
    cached_tokens: int
    started_ns: int | None = None
    """None: the engine attached while it ran."""
    ended_ns: int | None = None
    finish_reason: FinishReason | None = None
    recomputed_tokens: int = 0
    output_tokens: int = 0
    ttft_ns: int | None = None
    queued_ns: int | None = None
    cost: TurnCost | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    at_ns: int
    source: str
    count: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the daemon."""

    id: int
    boot_id: str
    pid: int
    started_ns: int
    started_unix_ns: int
    ended_ns: int | None
    """None: it runs, or it died."""
