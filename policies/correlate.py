"""Tool-call memory against KV occupancy, on one clock.

Owns the arithmetic that joins the two: what KV a session held while its tool call ran, what that cost in
byte-seconds, and how memory and KV move together on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .model import NS_PER_S, Engine, KvMeanwhile, KvTier, Session, SessionPhase, ToolCall


def device_bytes(session: Session, engine: Engine) -> int:
    """Bytes of the session's KV on the device."""
    return session.device_tokens() * engine.bytes_per_token


def held_bytes(session: Session, engine: Engine) -> int:
    """Bytes of the session's newest complete copy, in whichever tier; 0 where it has been dropped."""
    return 0 if session.tier is KvTier.NONE else session.held_tokens * engine.bytes_per_token


def meanwhile(kv: KvMeanwhile, session: Session, engine: Engine, from_ns: int, to_ns: int) -> KvMeanwhile:
    """`kv` advanced over [from_ns, to_ns), in which the session held what it holds now.

    Only time in which no turn of the session is computed counts as idle.
    """
    seconds = max(0, to_ns - from_ns) / NS_PER_S
    idle = session.phase is not SessionPhase.RUNNING
    return replace(
        kv,
        held_bytes=max(kv.held_bytes, held_bytes(session, engine)),
        idle_byte_seconds=kv.idle_byte_seconds + (seconds * device_bytes(session, engine) if idle else 0.0),
        host_byte_seconds=kv.host_byte_seconds + seconds * session.host_bytes,
    )


@dataclass(frozen=True, slots=True)
class Spike:
    """One tool call's memory peak and the KV its session held at that moment."""

    tool_call: ToolCall
    peak_bytes: int
    at_ns: int
    kv_held_bytes: int
    kv_idle_byte_seconds: float


def spike(call: ToolCall) -> Spike:
    return Spike(call, call.peak_bytes, call.peak_ns, call.kv.at_peak_bytes, call.kv.idle_byte_seconds)


@dataclass(frozen=True, slots=True)
class Covariance:
    """Running covariance of two series (Welford's update). Immutable: `observe` returns the next one."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    m2_x: float = 0.0
    m2_y: float = 0.0
    co: float = 0.0

    def observe(self, x: float, y: float) -> Covariance:
        count = self.count + 1
        dx, dy = x - self.mean_x, y - self.mean_y
        mean_x, mean_y = self.mean_x + dx / count, self.mean_y + dy / count
        return Covariance(
            count,
            mean_x,
            mean_y,
            self.m2_x + dx * (x - mean_x),
            self.m2_y + dy * (y - mean_y),
            self.co + dx * (y - mean_y),
        )

    @property
    def correlation(self) -> float | None:
        """Pearson's r in -1..1; None where one series has not moved."""
        if self.m2_x <= 0.0 or self.m2_y <= 0.0:
            return None
        return max(-1.0, min(1.0, self.co / math.sqrt(self.m2_x * self.m2_y)))
