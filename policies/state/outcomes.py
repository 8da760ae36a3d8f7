"""Decisions, and what came of them.

Owns which decisions are remembered, the verdict on a session and its calls, and which weights engines were told. A
decision alone changes only what is known of having been asked; what was done is known when its outcome is. It decides
nothing and asks nothing of anybody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from ..actions import (
    Action,
    Decision,
    Drop,
    Freeze,
    Grant,
    Hold,
    Kill,
    OutcomeStatus,
    Release,
    Retain,
    SetHostTierCapacity,
    SetTenantWeight,
    SwapIn,
    SwapOut,
    Thaw,
    Throttle,
    Wait,
)
from ..events import DecisionMade, OutcomeObserved
from ..model import KvTier, SessionId, ToolCallPhase, Verdict
from .phases import answered, hold_back, let_go
from .picture import Picture, arm


def _decided(picture: Picture, event: DecisionMade) -> None:
    decision = event.decision
    picture._decisions[decision.id] = decision
    match decision.action:
        case SwapOut(session=session, tier=tier):
            verdict = Verdict.SWAP_DISK if tier is KvTier.DISK else Verdict.SWAP_HOST
            _give_verdict(picture, session, verdict, decision.at_ns)
        case Retain(session=session):
            _give_verdict(picture, session, Verdict.KEEP, decision.at_ns)
        case Drop(session=session):
            _give_verdict(picture, session, Verdict.DROP, decision.at_ns)
        case SwapIn(session=session):
            if known := picture.sessions.get(session):
                picture.sessions[session] = replace(known, verdict=Verdict.KEEP, verdict_ns=decision.at_ns)
        case SetTenantWeight(engine=engine, tenant=tenant, weight=weight):
            picture._weights = {told for told in picture._weights if told[:2] != (engine, tenant)}
            picture._weights.add((engine, tenant, weight))
        case Wait(tool_call=tool_call, expires_ns=expires_ns):
            if call := picture._known(tool_call):
                picture._put(replace(call, waiting_until_ns=expires_ns))
        case Hold(session=session, ttl_ns=ttl_ns):
            _hold_until(picture, session, decision.at_ns + ttl_ns)
        case Release(session=session):
            _hold_until(picture, session, 0)
        case Throttle() | Freeze() | Thaw() | Grant() | Kill() | SetHostTierCapacity():
            pass  # their effect is known when the outcome is
        case other:
            assert_never(other)


def _outcome(picture: Picture, event: OutcomeObserved) -> None:
    outcome = event.outcome
    decision = picture._decisions.get(outcome.decision)
    if decision is None:
        picture.late_count += 1
        return
    match outcome.status:
        case OutcomeStatus.COMPLETED | OutcomeStatus.CLIPPED:
            _took_effect(picture, decision.action, outcome.at_ns)
        case OutcomeStatus.GONE:
            _found_nothing(picture, decision.action, outcome.at_ns)
        case OutcomeStatus.EXPIRED | OutcomeStatus.REJECTED | OutcomeStatus.FAILED:
            _did_not_hold(picture, decision, outcome.at_ns)
        case OutcomeStatus.ACCEPTED | OutcomeStatus.DEFERRED | OutcomeStatus.DRY_RUN:
            pass  # nothing was done yet, or never will be
        case other:
            assert_never(other)


def _took_effect(picture: Picture, action: Action, at_ns: int) -> None:
    match action:
        case Throttle(tool_call=tool_call):
            hold_back(picture, tool_call, ToolCallPhase.THROTTLED, at_ns)
        case Freeze(tool_call=tool_call):
            hold_back(picture, tool_call, ToolCallPhase.FROZEN, at_ns)
        case Thaw(tool_call=tool_call):
            let_go(picture, tool_call, at_ns)
        case Grant(tool_call=tool_call, soft_bytes=soft, hard_bytes=hard):
            answered(picture, tool_call, ToolCallPhase.RUNNING, at_ns)
            if call := picture._known(tool_call):
                picture._put(replace(call, soft_bytes=soft, hard_bytes=hard, granted_ns=at_ns))
        case Kill(tool_call=tool_call):
            answered(picture, tool_call, ToolCallPhase.KILLED, at_ns)
        case Wait():
            pass  # it was told when it was decided
        case SwapOut() | SwapIn() | Retain() | Drop() | Hold() | Release() | SetTenantWeight() | SetHostTierCapacity():
            pass  # engines report the effect themselves
        case other:
            assert_never(other)


def _found_nothing(picture: Picture, action: Action, at_ns: int) -> None:
    """There was nothing left to end, to let go or to continue: asking again would find nothing again."""
    match action:
        case Kill(tool_call=tool_call):
            answered(picture, tool_call, ToolCallPhase.KILLED, at_ns)
        case Grant(tool_call=tool_call):
            answered(picture, tool_call, ToolCallPhase.RUNNING, at_ns)
        case Thaw(tool_call=tool_call):
            let_go(picture, tool_call, at_ns)
        case Throttle() | Freeze() | Wait():
            pass  # what was not held back has not changed
        case SwapOut() | SwapIn() | Retain() | Drop() | Hold() | Release() | SetTenantWeight() | SetHostTierCapacity():
            pass  # nor has what was not moved
        case other:
            assert_never(other)


def _did_not_hold(picture: Picture, decision: Decision, at_ns: int) -> None:
    """It expired or was not followed: what was known of having been asked is taken back."""
    match decision.action:
        case Throttle(tool_call=tool_call) | Freeze(tool_call=tool_call):
            let_go(picture, tool_call, at_ns)
        case SwapOut(session=session) | Retain(session=session) | Drop(session=session) | SwapIn(session=session):
            _take_back_verdict(picture, session, decision.at_ns)
        case Hold(session=session):
            _hold_until(picture, session, 0)
        case SetTenantWeight(engine=engine, tenant=tenant, weight=weight):
            picture._weights.discard((engine, tenant, weight))
        case Thaw() | Grant() | Wait() | Kill() | SetHostTierCapacity() | Release():
            pass  # the call, or the tier, is as it was
        case other:
            assert_never(other)


def _hold_until(picture: Picture, session_id: SessionId, until_ns: int) -> None:
    if session := picture.sessions.get(session_id):
        picture.sessions[session_id] = replace(session, hold_until_ns=until_ns)


def _give_verdict(picture: Picture, session_id: SessionId, verdict: Verdict, at_ns: int) -> None:
    if session := picture.sessions.get(session_id):
        picture.sessions[session_id] = replace(session, verdict=verdict, verdict_ns=at_ns)
    _mark_calls(picture, session_id, verdict)


def _take_back_verdict(picture: Picture, session_id: SessionId, decided_ns: int) -> None:
    """The engine did not follow. The time of asking stays, so that it is not asked again before the dwell is over.

    A late answer to an older question changes nothing.
    """
    session = picture.sessions.get(session_id)
    if session is None or session.verdict_ns != decided_ns:
        return
    picture.sessions[session_id] = replace(session, verdict=None)
    _mark_calls(picture, session_id, None)


def _mark_calls(picture: Picture, session_id: SessionId, verdict: Verdict | None) -> None:
    for call in [c for c in picture.tool_calls.values() if c.session == session_id and c.running]:
        picture._put(replace(call, verdict=verdict))


def forget(picture: Picture, before_ns: int) -> None:
    """Drop the decisions made before `before_ns`; an outcome that comes later still is late."""
    for decision in [d for d in picture._decisions.values() if d.at_ns < before_ns]:
        del picture._decisions[decision.id]


ARMS = (arm(DecisionMade, _decided), arm(OutcomeObserved, _outcome))
