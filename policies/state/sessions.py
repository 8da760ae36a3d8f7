"""Engines, and the sessions whose KV they hold.

Owns `engines`, `sessions`, which of these were left behind, and the costs of turns that ended before their session was
seen. An engine's report is the whole picture of that engine; what it does not report (verdict, turns, cost) is
remembered. Verdicts are given and taken back by `outcomes.py`.
"""

from __future__ import annotations

from dataclasses import replace

from ..accounting import SessionCost
from ..events import (
    EngineAttached,
    EngineDetached,
    KvObserved,
    SessionMoved,
    TurnEnded,
    TurnPreempted,
    TurnStarted,
)
from ..model import EngineId, KvTier, SessionPhase
from .charges import accrue_all
from .joins import forget_engine, sandbox_of, turn_ended
from .picture import Picture, arm


def _engine_attached(picture: Picture, event: EngineAttached) -> None:
    accrue_all(picture, event.at_ns)
    picture.engines[event.engine.id] = event.engine
    _forget_weights(picture, event.engine.id)


def _engine_detached(picture: Picture, event: EngineDetached) -> None:
    engine = picture.engines.get(event.engine)
    if engine is None:
        picture.late_count += 1
        return
    accrue_all(picture, event.at_ns)
    picture.engines[event.engine] = replace(
        engine,
        attached=False,
        device_used_tokens=0,
        host_used_bytes=0,
        disk_used_bytes=0,
        running_count=0,
        waiting_count=0,
    )
    picture.sessions = {key: s for key, s in picture.sessions.items() if s.engine != event.engine}
    forget_engine(picture, event.engine)
    _forget_weights(picture, event.engine)
    _forget_early_costs(picture, event.engine)


def _kv_observed(picture: Picture, event: KvObserved) -> None:
    engine = picture.engines.get(event.engine)
    if engine is None:
        picture.late_count += 1
        return
    accrue_all(picture, event.at_ns)
    picture.engines[event.engine] = replace(
        engine,
        device_used_tokens=event.device_used_tokens,
        host_used_bytes=event.host_used_bytes,
        disk_used_bytes=event.disk_used_bytes,
        device_capacity_tokens=event.device_capacity_tokens,
        host_capacity_bytes=event.host_capacity_bytes,
        running_count=event.running_count,
        waiting_count=event.waiting_count,
        totals=event.totals,
        cost=event.cost or engine.cost,
        observed_ns=event.at_ns,
    )
    seen = {key: s for key, s in picture.sessions.items() if s.engine != event.engine}
    for session in event.sessions:
        known = picture.sessions.get(session.id, session)
        seen[session.id] = replace(  # what the engine does not report, we remember
            session,
            engine=event.engine,
            context_tokens=max(session.context_tokens, session.held_tokens),
            last_finish=known.last_finish,
            turn_count=known.turn_count,
            verdict=known.verdict,
            verdict_ns=known.verdict_ns,
            asked_ns=known.asked_ns,
            hold_until_ns=known.hold_until_ns,
            cost=picture._early_costs.get(session.id, (event.engine, known.cost))[1],
            sandbox=sandbox_of(picture, session),
        )
    picture.sessions = seen
    forget_engine(picture, event.engine)
    # The picture is whole: a session that is not in it is gone, and its early costs with it.
    _forget_early_costs(picture, event.engine)


def _turn_started(picture: Picture, event: TurnStarted) -> None:
    picture._left_behind.discard(event.session)
    if session := picture.sessions.get(event.session):
        accrue_all(picture, event.at_ns)
        picture.sessions[session.id] = replace(
            session,
            phase=SessionPhase.RUNNING,
            turn_count=session.turn_count + 1,
            verdict=None,
            verdict_ns=0,
            asked_ns=event.at_ns,
        )


def _turn_ended(picture: Picture, event: TurnEnded) -> None:
    turn_ended(picture, event.session, event.finish_reason)
    if session := picture.sessions.get(event.session):
        accrue_all(picture, event.at_ns)
        cost = session.cost.plus(event.cost)
        picture.sessions[session.id] = replace(
            session, phase=SessionPhase.IDLE, last_finish=event.finish_reason, cost=cost
        )
    elif event.engine in picture.engines:
        _, so_far = picture._early_costs.get(event.session, (event.engine, SessionCost()))
        picture._early_costs[event.session] = (event.engine, so_far.plus(event.cost))


def _turn_preempted(_picture: Picture, _event: TurnPreempted) -> None:
    """Nothing yet: the occupancy report that follows says where its KV is."""


def _session_moved(picture: Picture, event: SessionMoved) -> None:
    if session := picture.sessions.get(event.session):
        accrue_all(picture, event.at_ns)
        held = 0 if event.to_tier is KvTier.NONE else session.held_tokens
        picture.sessions[session.id] = replace(session, tier=event.to_tier, held_tokens=held)


def _forget_weights(picture: Picture, engine: EngineId) -> None:
    picture._weights = {told for told in picture._weights if told[0] != engine}


def _forget_early_costs(picture: Picture, engine: EngineId) -> None:
    picture._early_costs = {key: early for key, early in picture._early_costs.items() if early[0] != engine}


def forget(picture: Picture) -> None:
    """Nobody is left behind who is in no engine."""
    picture._left_behind &= picture.sessions.keys()


def check(picture: Picture) -> None:
    """Raise AssertionError where an invariant of sessions is broken."""
    for session in picture.sessions.values():
        assert session.engine in picture.engines, f"{session.id}: its engine is unknown"
        assert session.held_tokens <= session.context_tokens, f"{session.id}: holds more than its context"


ARMS = (
    arm(EngineAttached, _engine_attached),
    arm(EngineDetached, _engine_detached),
    arm(KvObserved, _kv_observed),
    arm(TurnStarted, _turn_started),
    arm(TurnEnded, _turn_ended),
    arm(TurnPreempted, _turn_preempted),
    arm(SessionMoved, _session_moved),
)
