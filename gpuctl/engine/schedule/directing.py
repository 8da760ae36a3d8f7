"""Carries out what a daemon asks, at a step border, and answers for it.

Owns: the checks and effects of each directive, and the ones put off until they can be done. Must not: remember outcomes
or speak gRPC (outcomes.py and client.py above do). Anything that cannot be done is answered with a reason, never half
done.
"""

from __future__ import annotations

from typing import assert_never

from ....policies.model import KvTier
from ... import directives as ask
from ...directives import Directive, Outcome, OutcomeStatus
from .placement import Reach
from .scheduler import Scheduler
from .sequence import Session, Tier

MAX_TTL_NS = 3600 * 10**9
MAX_WEIGHT = 1000.0

_Putoff = ask.SwapOut | ask.SwapIn


class Director:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ledger = scheduler.ledger
        self._placement = scheduler.placement
        self._deferred: dict[str, _Putoff] = {}

    def apply(self, directive: Directive, now_ns: int) -> Outcome:
        """Do what is asked or say why not. Moves it causes are part of the next plan; ACCEPTED means they are."""
        if directive.deadline_ns <= now_ns:
            return _outcome(directive, OutcomeStatus.EXPIRED, "the deadline passed before it could be done")
        match directive:
            case ask.SetTenantWeight():
                return self._set_weight(directive)
            case ask.SetCapacity():
                return self._set_capacity(directive, now_ns)
            case ask.SetHostTierCapacity():
                return self._set_host_capacity(directive)
            case _:
                session = self._scheduler.sessions.get(directive.session_id)
                if session is None:
                    return _outcome(directive, OutcomeStatus.REJECTED, f"no session {directive.session_id}")
                return self._apply_to_session(directive, session, now_ns)

    def retry_deferred(self, now_ns: int) -> list[Outcome]:
        """Try again what was put off; the outcomes of what is no longer put off."""
        settled = []
        for directive in list(self._deferred.values()):
            outcome = self.apply(directive, now_ns)
            if outcome.status is not OutcomeStatus.DEFERRED:
                del self._deferred[directive.directive_id]
                settled.append(outcome)
        return settled

    def next_deadline_ns(self) -> int | None:
        return min((directive.deadline_ns for directive in self._deferred.values()), default=None)

    def _apply_to_session(
        self,
        directive: ask.Hold | ask.Release | ask.Preempt | ask.SwapOut | ask.SwapIn | ask.Retain | ask.Drop,
        session: Session,
        now_ns: int,
    ) -> Outcome:
        match directive:
            case ask.Hold():
                ttl_ns = min(directive.ttl_ns, MAX_TTL_NS)
                session.held_until_ns = now_ns + ttl_ns
                self._scheduler.pause(session.id)
                return _clipped(directive, "ttl cut to 1 h") if ttl_ns < directive.ttl_ns else _done(directive)
            case ask.Release():
                session.held_until_ns = None
                return _done(directive)
            case ask.Preempt():
                return self._preempt(directive, session)
            case ask.SwapOut():
                return self._swap_out(directive, session)
            case ask.SwapIn():
                return self._swap_in(directive, session, now_ns)
            case ask.Retain():
                return self._retain(directive, session, now_ns)
            case ask.Drop():
                return self._drop(directive, session)
            case _:
                assert_never(directive)

    # Engine-wide

    def _set_weight(self, directive: ask.SetTenantWeight) -> Outcome:
        if not 0 < directive.weight <= MAX_WEIGHT:
            return _rejected(directive, f"weight {directive.weight}: give one above 0, at most {MAX_WEIGHT:g}")
        self._scheduler.service.set_weight(directive.tenant_id, directive.weight)
        return _done(directive)

    def _set_capacity(self, directive: ask.SetCapacity, now_ns: int) -> Outcome:
        physical = self._scheduler.physical_tokens
        wanted = max(1, min(directive.device_tokens, physical))
        self._ledger.device_capacity_tokens = wanted
        self._placement.make_room(-self._ledger.device_free_tokens, now_ns, Reach.UNPINNED)
        if wanted != directive.device_tokens:
            return _clipped(directive, f"set to {wanted}: the context has {physical}")
        return _done(directive)

    def _set_host_capacity(self, directive: ask.SetHostTierCapacity) -> Outcome:
        """Set the size of the tier in host RAM; copies that no longer fit go down where there is room, else away."""
        if directive.host_bytes < 0:
            return _rejected(directive, f"host_bytes {directive.host_bytes}: give 0 or more")
        lower = next((each for each in self._ledger.lower if each.tier.told_as is KvTier.HOST), None)
        if lower is None:
            return _rejected(directive, "no tier in host RAM")
        lower.capacity_bytes, tier = directive.host_bytes, lower.tier
        self._placement.shed(tier, 0)
        holders = [self._scheduler.sessions[s] for s in self._ledger if self._ledger.holding(s).copy_tokens(tier)]
        for session in sorted(holders, key=lambda s: (s.turn is not None, s.last_used_ns)):
            if self._ledger.room(tier, 0):
                break
            if not self._placement.demote(session, tier):
                self._placement.discard_copy(session, tier)
        return _done(directive)

    # One session

    def _preempt(self, directive: ask.Preempt, session: Session) -> Outcome:
        turn = self._scheduler.running.get(session.id)
        if turn is None:
            return _rejected(directive, "no turn of the session is running")
        tier = Tier.NONE if directive.mode is ask.PreemptMode.RECOMPUTE else None
        self._scheduler.preempt(turn, tier=tier, directive_id=directive.directive_id)
        return _outcome(directive, OutcomeStatus.ACCEPTED)

    def _swap_out(self, directive: ask.SwapOut, session: Session) -> Outcome:
        if directive.tier in (KvTier.DEVICE, KvTier.NONE):
            return _rejected(directive, "tier: give host or disk")
        wanted = [each.tier for each in self._ledger.lower if each.tier.told_as is directive.tier]
        if not wanted:
            return _rejected(directive, f"no {directive.tier.value} tier")
        if session.id in self._scheduler.running:
            return self._put_off(directive, "its turn is running: done when the turn ends")
        holding = self._ledger.holding(session.id)
        where, held = holding.longest()
        if where is Tier.NONE or where in wanted:
            return _done(directive, f"{held} tokens are held in {where.value}")
        if where is Tier.DEVICE:
            for tier in wanted:
                if self._placement.fits(session, tier, holding.device_tokens):
                    self._placement.evict(session, tier, directive.directive_id)
                    return _outcome(directive, OutcomeStatus.ACCEPTED)
            return _rejected(directive, f"no room in the {directive.tier.value} tier")
        for tier in wanted:
            if self._placement.demote(session, where, to=tier, directive_id=directive.directive_id):
                return _outcome(directive, OutcomeStatus.ACCEPTED)
        return _rejected(directive, f"held in {where.value}; no way from there to {directive.tier.value}")

    def _swap_in(self, directive: ask.SwapIn, session: Session, now_ns: int) -> Outcome:
        tier, tokens = self._ledger.holding(session.id).longest()
        if tier is Tier.DEVICE:
            return _done(directive, "already on the device")
        if tier is Tier.NONE:
            return _rejected(directive, "nothing is held: the next turn computes it")
        # A prefetch may only take what nobody wants any more: others' retention is worth as much as this session's.
        missing = tokens - self._ledger.holding(session.id).device_tokens - self._ledger.device_free_tokens
        if missing > self._placement.reclaimable(now_ns, Reach.EXPIRED, {session.id}):
            return self._put_off(directive, "no room on the device yet")
        self._placement.make_room(missing, now_ns, Reach.EXPIRED, {session.id})
        if not self._placement.ensure_slot(session, now_ns, Reach.EXPIRED):
            return self._put_off(directive, "no free slot yet")
        self._placement.move_in(session, directive.directive_id)
        session.retain_until_ns = max(session.retain_until_ns, now_ns + self._scheduler.config.retain_ns)
        return _outcome(directive, OutcomeStatus.ACCEPTED)

    def _retain(self, directive: ask.Retain, session: Session, now_ns: int) -> Outcome:
        ttl_ns = min(directive.ttl_ns, MAX_TTL_NS)
        session.pinned_until_ns = now_ns + ttl_ns
        session.retain_until_ns = max(session.retain_until_ns, session.pinned_until_ns)
        if not self._ledger.holding(session.id).device_tokens:
            return _clipped(directive, "not on the device: kept from when it is back there")
        return _clipped(directive, "ttl cut to 1 h") if ttl_ns < directive.ttl_ns else _done(directive)

    def _drop(self, directive: ask.Drop, session: Session) -> Outcome:
        if session.id in self._scheduler.running:
            return _rejected(directive, "its turn is running: preempt it instead")
        if directive.from_token < 0:
            return _rejected(directive, f"from_token {directive.from_token}: give 0 or more")
        held = self._ledger.holding(session.id).longest()[1]
        if directive.from_token >= held:
            return _done(directive, f"only {held} tokens are held")
        if directive.from_token > 0:
            self._placement.truncate(session, directive.from_token, directive.directive_id)
        else:
            self._placement.discard_all(session, directive.directive_id)
        return _done(directive)

    def _put_off(self, directive: _Putoff, reason: str) -> Outcome:
        self._deferred[directive.directive_id] = directive
        return _outcome(directive, OutcomeStatus.DEFERRED, reason)


def _outcome(directive: Directive, status: OutcomeStatus, reason: str = "") -> Outcome:
    return Outcome(directive.directive_id, status, reason)


def _done(directive: Directive, reason: str = "") -> Outcome:
    return _outcome(directive, OutcomeStatus.COMPLETED, reason)


def _clipped(directive: Directive, reason: str) -> Outcome:
    return _outcome(directive, OutcomeStatus.CLIPPED, reason)


def _rejected(directive: Directive, reason: str) -> Outcome:
    return _outcome(directive, OutcomeStatus.REJECTED, reason)
