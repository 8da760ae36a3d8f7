"""What the engine tells whoever watches: past facts, one dataclass each.

Owns: the closed set of reports. Must not: import gRPC (client.py translates them).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from ..policies.accounting import TurnCost
from .directives import Outcome
from .engine.schedule.sequence import FinishReason, SessionId, SessionPhase, TenantId, Tier, Turn, TurnFinished, TurnId


@dataclass(frozen=True, slots=True)
class CostFigures:
    """Speeds measured on this machine; 0 where not measured."""

    prefill_seconds_per_token: float = 0.0
    prefill_seconds_per_token2: float = 0.0
    decode_step_seconds: float = 0.0
    decode_seconds_per_sequence: float = 0.0
    decode_seconds_per_context_token: float = 0.0
    """What each token of context adds to a decode step: reading its KV."""
    host_bytes_per_second: float = 0.0
    disk_bytes_per_second: float = 0.0

    def prefill_seconds(self, tokens: int, held_tokens: int = 0) -> float:
        """Seconds to compute a prompt of `tokens` of which the first `held_tokens` are held."""
        pairs = tokens * tokens - held_tokens * held_tokens
        return self.prefill_seconds_per_token * (tokens - held_tokens) + self.prefill_seconds_per_token2 * pairs

    def prefill_tokens_within(self, seconds: float, held_tokens: int = 0) -> int:
        """Most tokens after the first `held_tokens` that `prefill_seconds` says are computed within `seconds`.

        The root of b n^2 + (a + 2 b held) n = seconds; without measured figures as many as one likes (sys.maxsize).
        """
        if seconds <= 0:
            return 0
        per_pair = self.prefill_seconds_per_token2
        linear = self.prefill_seconds_per_token + 2 * per_pair * held_tokens
        if linear + per_pair <= 0:
            return sys.maxsize
        # The form that does not subtract nearly equal numbers where b is small.
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * per_pair * seconds)))

    def decode_seconds(self, sequences: int) -> float:
        """Seconds of a step that computes one token each of so many sequences; 0 for none."""
        return self.decode_step_seconds + (sequences - 1) * self.decode_seconds_per_sequence if sequences else 0.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Who the engine is; stable for its life."""

    engine_id: str
    model: str
    pid: int
    bytes_per_token: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    disk_capacity_bytes: int
    cost: CostFigures


@dataclass(slots=True)
class Totals:
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
    steps: int = 0
    turns_finished: int = 0
    swap_failures: int = 0
    interrupted_steps: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SessionKv:
    session_id: SessionId
    tenant_id: TenantId
    phase: SessionPhase
    tier: Tier
    held_tokens: int
    context_tokens: int
    host_bytes: int
    disk_bytes: int
    retain_until_ns: int | None
    shared_tokens: int = 0
    charged_tokens: float = 0.0
    """Device cells it answers for: a cell with n users counts 1/n for each. All sessions' add up to what is used."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The full picture: a session not listed is gone."""

    sessions: tuple[SessionKv, ...]
    device_used_tokens: int
    host_used_bytes: int
    disk_used_bytes: int
    running_count: int
    waiting_count: int
    device_capacity_tokens: int
    host_capacity_bytes: int
    totals: Totals
    cost: CostFigures


@dataclass(frozen=True, slots=True)
class TurnStarted:
    session_id: SessionId
    tenant_id: TenantId
    turn_id: TurnId
    prompt_tokens: int
    cached_tokens: int
    peer_port: int | None


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


def turn_ended(turn: Turn, end: TurnFinished, reason: FinishReason) -> TurnEnded:
    """The report of what the turn's client was told; `reason` may be plainer to the daemon than to the client."""
    return TurnEnded(
        session_id=turn.session_id,
        tenant_id=turn.tenant_id,
        turn_id=turn.id,
        finish_reason=reason,
        prompt_tokens=end.prompt_tokens,
        cached_tokens=end.cached_tokens,
        recomputed_tokens=end.recomputed_tokens,
        output_tokens=end.output_tokens,
        ttft_ns=end.ttft_ns,
        queued_ns=end.queued_ns,
        cost=end.cost,
    )


@dataclass(frozen=True, slots=True)
class SessionMoved:
    session_id: SessionId
    tenant_id: TenantId
    from_tier: Tier
    to_tier: Tier
    tokens: int
    moved_bytes: int
    duration_ns: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class TurnPreempted:
    session_id: SessionId
    tenant_id: TenantId
    turn_id: TurnId
    to_tier: Tier
    directive_id: str = ""


Report = Occupancy | TurnStarted | TurnEnded | SessionMoved | TurnPreempted | Outcome


@dataclass(frozen=True, slots=True)
class Reported:
    """A report and when it became true (CLOCK_MONOTONIC)."""

    at_ns: int
    report: Report
