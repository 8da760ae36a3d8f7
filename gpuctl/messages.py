"""EngineReport messages -> the core's facts, and what both ends of the hook translate alike.

Owns: which fact a report is, and what the two call differently. Must not: spell fields out (translation.py pairs them
by name), or keep a picture.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from ..policies.accounting import TurnCost
from ..policies.events import Event, KvObserved, SessionMoved, TurnEnded, TurnPreempted, TurnStarted
from ..policies.model import CostModel, Engine, EngineId, EngineTotals, FinishReason, KvTier, Session, SessionPhase
from .api.v1 import engine_pb2 as pb
from .translation import Enumeration, OneOf, Translation

KV_TIER = Enumeration(KvTier, pb.KvTier, unknown=KvTier.NONE)
SESSION_PHASE = Enumeration(SessionPhase, pb.SessionPhase, unknown=SessionPhase.IDLE)
FINISH_REASON = Enumeration(FinishReason, pb.FinishReason, unknown=FinishReason.ERROR)
TURN_COST = Translation(TurnCost, pb.TurnCost)
"""What is not known is absent, and never 0."""
COST_MODEL = Translation(CostModel, pb.CostModel)
ENGINE_TOTALS = Translation(EngineTotals, pb.EngineTotals)
SHARED = (KV_TIER, SESSION_PHASE, FINISH_REASON, TURN_COST, COST_MODEL, ENGINE_TOTALS)


_ENGINE = Translation(
    Engine,
    pb.EngineHello,
    renamed={"id": "engine_id"},
    here=(
        *("attached", "device_used_tokens", "host_used_bytes", "disk_used_bytes", "running_count", "waiting_count"),
        *("totals", "observed_ns"),
    ),
    using=SHARED,
)
_KV_OBSERVED = Translation(
    KvObserved, pb.Occupancy, here=("at_ns", "engine", "sessions"), there=("sessions",), using=SHARED
)
_SESSION = Translation(
    Session,
    pb.SessionKv,
    renamed={"id": "session_id", "tenant": "tenant_id"},
    here=(
        "engine",
        "observed_ns",
        "last_finish",
        "turn_count",
        "verdict",
        "verdict_ns",
        "cost",
        "sandbox",
        "asked_ns",
        "hold_until_ns",
    ),
    there=("charged_tokens",),
    using=SHARED,
)


def _of_a_session(kind: type, message: type[Message], *renamed: str) -> Translation[Any, Any]:
    names = {each: f"{each}_id" for each in ("session", *renamed)}
    return Translation(kind, message, renamed=names, here=("at_ns", "engine"), there=("tenant_id",), using=SHARED)


_EVENTS: OneOf[Event, pb.EngineReport] = OneOf(
    pb.EngineReport,
    "report",
    (
        _of_a_session(TurnStarted, pb.TurnStarted, "turn"),
        _of_a_session(TurnEnded, pb.TurnEnded, "turn"),
        _of_a_session(SessionMoved, pb.SessionMoved, "directive"),
        _of_a_session(TurnPreempted, pb.TurnPreempted, "turn", "directive"),
    ),
    there=("hello", "occupancy", "directive_outcome", "peer_seen"),
)


def engine_of(hello: pb.EngineHello) -> Engine:
    """The engine that says hello. Negative numbers count as 0."""
    return _ENGINE.decode(
        hello,
        kind=hello.kind or "unknown",
        bytes_per_token=max(0, hello.bytes_per_token),
        device_capacity_tokens=max(0, hello.device_capacity_tokens),
        host_capacity_bytes=max(0, hello.host_capacity_bytes),
        disk_capacity_bytes=max(0, hello.disk_capacity_bytes),
    )


def event_of(report: pb.EngineReport, engine: EngineId) -> Event | None:
    """The event a report stands for; None for one that stands for none, or that this version does not know."""
    if report.WhichOneof("report") == "occupancy":
        return _kv_observed(report.at_ns, report.occupancy, engine)
    return _EVENTS.decode(report, at_ns=report.at_ns, engine=engine)


def _kv_observed(at_ns: int, seen: pb.Occupancy, engine: EngineId) -> KvObserved:
    sessions = tuple(
        _SESSION.decode(kv, engine=engine, observed_ns=at_ns, context_tokens=max(kv.context_tokens, kv.held_tokens))
        for kv in seen.sessions
    )
    return _KV_OBSERVED.decode(seen, at_ns=at_ns, engine=engine, sessions=sessions)
