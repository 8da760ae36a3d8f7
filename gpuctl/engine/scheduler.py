"""Decides, at each step border, who computes what and whose KV goes where.

Owns: the queue, the order of tenants (service.py), admission (admission.py), eviction, preemption, holds, retention,
and the ledger. Pure: no binding, no clock, no threads; time enters as `now_ns`, decisions leave as a StepPlan that the
engine carries out. Must not: move bytes, sample, or know text.

Rules
- Continuous batching: every step carries one token of each decoding turn and chunks of the prompts, within step_tokens.
- Order: the tenant with the least weighted service first; within a tenant the oldest turn.
- A turn is admitted when its whole prompt fits and the Past-Future peak of the batch stays below capacity. Admission
  stops at the first turn that does not fit: a small turn never overtakes a large one for good.
- Room is made from idle sessions in the order their retention ends, then from waiting turns that still hold KV, from
  the back of the queue. A directed retention is broken only where nothing could run otherwise.
- A running turn loses its place only when the running ones outgrow capacity: the most-served tenant's youngest goes.
- A turn that runs alone may always go on: progress does not depend on a capacity that was lowered under it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from . import directives as ask
from .admission import OutputLengths, peak_tokens
from .directives import Directive, Outcome, OutcomeStatus
from .ledger import Ledger
from .sequence import IdlePolicy, Session, SessionId, SessionPhase, Slot, TenantId, Tier, Turn
from .service import TokenService

MAX_TTL_NS = 3600 * 10**9
MAX_WEIGHT = 1000.0


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    step_tokens: int = 256
    """Most tokens of one step, prompts and outputs together."""
    mixed_prefill_tokens: int = 64
    """Most prompt tokens of a step that also decodes: bounds the pause a long prompt puts between two outputs."""
    max_running: int = 16
    idle_policy: IdlePolicy = IdlePolicy.RETAIN
    retain_ns: int = 30 * 10**9
    """The engine's own retention after a turn."""
    forget_ns: int = 3600 * 10**9
    """A session unused for so long is forgotten in every tier."""
    admission_quantile: float = 0.8
    admit_full_output: bool = False
    """Reserve every turn's whole max_tokens (no Past-Future): the cautious baseline."""


@dataclass(frozen=True, slots=True)
class MoveOut:
    """Copy the device KV to `tier` (from `valid_tokens` on: what lies before is there already) and free the slot."""

    session_id: SessionId
    slot: Slot
    tier: Tier
    tokens: int
    valid_tokens: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class MoveIn:
    """Fill the slot from the copy in `tier`."""

    session_id: SessionId
    slot: Slot
    tier: Tier
    tokens: int
    directive_id: str = ""


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget KV: on the device from `from_token` on, or a whole copy in another tier. Slot None: nothing on device."""

    session_id: SessionId
    slot: Slot | None
    from_token: int
    tier: Tier
    directive_id: str = ""


Move = MoveOut | MoveIn | Discard


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute `count` tokens of the session from position `start`; sample the next one if the slice reaches the end."""

    session_id: SessionId
    slot: Slot
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class PreemptedTurn:
    session_id: SessionId
    to_tier: Tier
    directive_id: str = ""


@dataclass(slots=True)
class StepPlan:
    """What the engine does next, in this order: moves, then the batch."""

    moves: list[Move] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    admitted: list[SessionId] = field(default_factory=list)
    preempted: list[PreemptedTurn] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    forgotten: list[SessionId] = field(default_factory=list)
    wake_ns: int | None = None
    """When something changes by itself although nothing arrives."""


class _Reach(enum.Enum):
    """How far making room may go."""

    EXPIRED = 1
    UNPINNED = 2
    PINNED = 3


class Scheduler:
    def __init__(self, config: SchedulerConfig, ledger: Ledger, *, physical_tokens: int) -> None:
        """`physical_tokens`: cells the context really has; capacity directives are clipped to it."""
        self.config = config
        self.ledger = ledger
        self.physical_tokens = physical_tokens
        self.service = TokenService()
        self.lengths = OutputLengths()
        self.sessions: dict[SessionId, Session] = {}
        self.running: dict[SessionId, Turn] = {}
        self.waiting: dict[SessionId, Turn] = {}
        self._deferred: list[ask.SwapOut | ask.SwapIn] = []
        self._plan = StepPlan()

    # Turns

    def submit(self, session: Session, turn: Turn) -> None:
        """Queue a turn. The session's tokens are its whole prompt, and the ledger holds a true prefix of them."""
        assert session.turn is None, f"{session.id}: one turn at a time"
        session.turn = turn
        self.sessions[session.id] = session
        self.waiting[session.id] = turn
        self.service.arrive(turn.tenant_id)

    def finish(self, session_id: SessionId, now_ns: int, *, completed: bool = True) -> None:
        """The turn ended; its KV now follows the idle policy. `completed`: its output length is worth remembering."""
        session = self.sessions[session_id]
        turn = session.turn
        assert turn is not None
        session.turn = None
        session.last_used_ns = now_ns
        session.retain_until_ns = now_ns + self.config.retain_ns
        self.running.pop(session_id, None)
        self.waiting.pop(session_id, None)
        self.service.leave(turn.tenant_id)
        if completed:
            self.lengths.add(turn.output_tokens)
        if session.ephemeral:
            self._forget(session)
        elif self.config.idle_policy is IdlePolicy.DROP:
            self._discard_all(session)
        elif self.config.idle_policy is IdlePolicy.SWAP and session.pinned_until_ns is None:
            self._evict(session)

    def computed(self, session_id: SessionId, start: int, count: int) -> None:
        """A slice was computed: book its tokens and charge new prompt tokens to the tenant."""
        session = self.sessions[session_id]
        self.ledger.grow(session_id, count)
        again = max(0, min(start + count, session.computed_high_tokens) - start)
        session.computed_high_tokens = max(session.computed_high_tokens, start + count)
        if (turn := session.turn) is None:
            return
        turn.recomputed_tokens += again
        # Charged as it is computed, not at admission: a turn cancelled half way has had half the service. What the
        # engine dropped and computes again is not the tenant's doing. Outputs are charged when sampled.
        prompt_new = min(start + count, turn.prompt_tokens) - start - again
        if prompt_new > 0:
            self.service.charge_input(turn.tenant_id, prompt_new)

    def produced(self, session_id: SessionId) -> None:
        """One output token was sampled and appended to the session."""
        turn = self.running[session_id]
        turn.output_tokens += 1
        self.service.charge_output(turn.tenant_id, 1)

    def lost(self, session_id: SessionId) -> None:
        """A copy turned out unusable: nothing of the session is held any more; its turn computes from the start."""
        self.ledger.truncate(session_id, 0)
        if session_id not in self.running:
            self.ledger.leave_device(session_id)

    def phase(self, session: Session) -> SessionPhase:
        if session.held_until_ns is not None:
            return SessionPhase.HELD
        if session.id in self.running:
            return SessionPhase.RUNNING
        return SessionPhase.WAITING if session.id in self.waiting else SessionPhase.IDLE

    def busy(self) -> bool:
        """Whether a turn could use a step now."""
        return bool(self.running) or any(self.sessions[s].held_until_ns is None for s in self.waiting)

    # The step

    def plan(self, now_ns: int) -> StepPlan:
        """Decide the next step and book it: the ledger already says what will hold once the plan is carried out,
        except for the tokens of the slices, which `computed` books."""
        self._expire(now_ns)
        self._retry_deferred(now_ns)
        if self.ledger.device_free_tokens < 0:
            self._make_room(-self.ledger.device_free_tokens, now_ns, _Reach.UNPINNED)
        self._admit(now_ns)
        self._batch(now_ns)
        plan, self._plan = self._plan, StepPlan()
        plan.wake_ns = self._next_wake()
        return plan

    def _ordered(self, turns: Iterable[Turn]) -> list[Turn]:
        """Least-served tenant first, oldest turn first within it."""
        return sorted(turns, key=lambda t: (self.service.counter(t.tenant_id), t.tenant_id, t.arrival_ns))

    def _left(self, turn: Turn) -> int:
        """Output tokens the turn will likely still produce."""
        if self.config.admit_full_output:
            return turn.max_output_tokens - turn.output_tokens
        return self.lengths.remaining(turn.output_tokens, turn.max_output_tokens, self.config.admission_quantile)

    def _admit(self, now_ns: int) -> None:
        order = self._ordered(t for s, t in self.waiting.items() if self.sessions[s].held_until_ns is None)
        while order and len(self.running) < self.config.max_running:
            turn = order[0]
            if not self._fits(turn, now_ns):
                return
            self._enter(turn, now_ns)
            order = self._ordered(order[1:])

    def _fits(self, turn: Turn, now_ns: int) -> bool:
        """Make room for the turn beside the running ones, if that can be done."""
        session = self.sessions[turn.session_id]
        batch = [*self.running.values(), turn]
        peak = peak_tokens((len(self.sessions[t.session_id].tokens), self._left(t)) for t in batch)
        in_batch = sum(self.ledger.holding(t.session_id).device_tokens for t in batch)
        others = self.ledger.device_used_tokens - in_batch
        missing = peak + others - self.ledger.device_capacity_tokens
        alone = not self.running
        reach = _Reach.PINNED if alone else _Reach.UNPINNED
        keep = {turn.session_id}
        if missing > 0:
            if not alone and missing > self._reclaimable(now_ns, reach, keep):
                return False
            self._make_room(missing, now_ns, reach, keep=keep)
        if not self._has_slot(session):
            self._make_slot(now_ns, reach, keep)
        return self._has_slot(session)

    def _has_slot(self, session: Session) -> bool:
        return self.ledger.holding(session.id).slot is not None or self.ledger.free_slot_count > 0

    def _enter(self, turn: Turn, now_ns: int) -> None:
        session = self.sessions[turn.session_id]
        holding = self.ledger.holding(session.id)
        tier, held = holding.longest()
        slot = self.ledger.open(session.id)
        if tier in (Tier.HOST, Tier.DISK):
            self._move_in(session, slot, tier, "")
        # At least the last token is computed, or there would be nothing to sample from.
        last = len(session.tokens) - 1
        if held > last:
            self._truncate(session, last)
        if turn.admitted_ns is None:
            turn.admitted_ns = now_ns
            turn.cached_tokens = min(held, last)
            self._plan.admitted.append(session.id)
        del self.waiting[session.id]
        self.running[session.id] = turn

    def _batch(self, now_ns: int) -> None:
        """Fill the step: decoding turns first, then prompts in order of service."""
        turns = self._ordered(self.running.values())
        left = {t.session_id: self._missing_tokens(t) for t in turns}
        decoding = [t for t in turns if left[t.session_id] == 1]
        prefilling = [t for t in turns if left[t.session_id] > 1]
        budget = self.config.step_tokens - len(decoding)
        if decoding:
            budget = min(budget, self.config.mixed_prefill_tokens)
        counts = {t.session_id: 1 for t in decoding}
        for turn in prefilling:
            if budget <= 0:
                break
            counts[turn.session_id] = min(left[turn.session_id], budget)
            budget -= counts[turn.session_id]
        self._fit_batch(counts, turns, now_ns)
        for session_id, count in counts.items():
            holding = self.ledger.holding(session_id)
            assert holding.slot is not None
            self._plan.slices.append(
                Slice(session_id, holding.slot, holding.device_tokens, count, samples=count == left[session_id])
            )

    def _missing_tokens(self, turn: Turn) -> int:
        return len(self.sessions[turn.session_id].tokens) - self.ledger.holding(turn.session_id).device_tokens

    def _fit_batch(self, counts: dict[SessionId, int], order: list[Turn], now_ns: int) -> None:
        """Make the step's growth fit: room from idle sessions, else shorter chunks, else preemption."""
        short = sum(counts.values()) - self.ledger.device_free_tokens
        if short > 0:
            self._make_room(short, now_ns, _Reach.UNPINNED)
        # Shorten prompts from the back of the order: nobody loses what is already computed.
        for turn in reversed(order):
            short = sum(counts.values()) - self.ledger.device_free_tokens
            if short <= 0:
                return
            count = counts.get(turn.session_id, 0)
            if count > 1:
                counts[turn.session_id] = max(1, count - short)
        for turn in reversed(order):
            short = sum(counts.values()) - self.ledger.device_free_tokens
            if short <= 0:
                return
            if len(self.running) == 1:
                self._make_room(short, now_ns, _Reach.PINNED)
                return
            counts.pop(turn.session_id, None)
            self._preempt(turn, "")

    # Making room

    def _candidates(self, now_ns: int, reach: _Reach, keep: Iterable[SessionId] = ()) -> list[Session]:
        """Sessions that hold device KV and are not computing, in the order they should leave."""
        spared = set(keep)
        found: list[tuple[tuple[int, float, int], Session]] = []
        for session_id in self.ledger:
            session = self.sessions[session_id]
            if session_id in spared or session_id in self.running:
                continue
            if self.ledger.holding(session_id).slot is None:
                continue
            pinned = session.pinned_until_ns is not None
            if pinned and reach is not _Reach.PINNED:
                continue
            if session.turn is not None:
                if reach is _Reach.EXPIRED:
                    continue
                # Its turn waits: the later it will run, the sooner it may leave.
                rank = (2 if pinned else 1, -self.service.counter(session.tenant_id), -session.turn.arrival_ns)
            else:
                if reach is _Reach.EXPIRED and session.retain_until_ns > now_ns:
                    continue
                rank = (2 if pinned else 0, session.retain_until_ns, 0)
            found.append((rank, session))
        return [session for _, session in sorted(found, key=lambda entry: entry[0])]

    def _reclaimable(self, now_ns: int, reach: _Reach, keep: Iterable[SessionId]) -> int:
        return sum(self.ledger.holding(s.id).device_tokens for s in self._candidates(now_ns, reach, keep))

    def _make_room(self, tokens: int, now_ns: int, reach: _Reach, keep: Iterable[SessionId] = ()) -> None:
        """Evict until `tokens` have been freed or nobody is left to evict."""
        for session in self._candidates(now_ns, reach, keep):
            if tokens <= 0:
                return
            tokens -= self.ledger.holding(session.id).device_tokens
            self._evict(session)

    def _make_slot(self, now_ns: int, reach: _Reach, keep: Iterable[SessionId]) -> None:
        for session in self._candidates(now_ns, reach, keep)[:1]:
            self._evict(session)

    def _evict(self, session: Session, tier: Tier | None = None, directive_id: str = "") -> Tier:
        """Free the device: to `tier`, or by default to the host where there is room, else disk, else nowhere.

        Returns where the KV went. A longer or equal copy that is already there makes it free of charge.
        """
        holding = self.ledger.holding(session.id)
        slot, tokens = holding.slot, holding.device_tokens
        if slot is None:
            return holding.longest()[0]
        session.pinned_until_ns = None
        for wanted in (tier,) if tier else (Tier.HOST, Tier.DISK):
            if wanted is Tier.NONE or not tokens:
                continue
            valid = holding.host_tokens if wanted is Tier.HOST else holding.disk_tokens
            appended = max(0, tokens - valid)
            if not self._host_room(wanted, appended, session.id):
                continue
            self.ledger.copied(session.id, wanted, max(tokens, valid))
            self.ledger.leave_device(session.id)
            self._plan.moves.append(MoveOut(session.id, slot, wanted, tokens, min(valid, tokens), directive_id))
            return wanted
        self.ledger.leave_device(session.id)
        self._plan.moves.append(Discard(session.id, slot, 0, Tier.DEVICE, directive_id))
        # An older, shorter copy elsewhere is still a true prefix and stays.
        return self.ledger.holding(session.id).longest()[0]

    def _host_room(self, tier: Tier, appended: int, keep: SessionId) -> bool:
        """Whether the tier takes `appended` more tokens, giving up copies the device also has where that helps."""
        if self.ledger.room(tier, appended):
            return True
        if tier is Tier.HOST:
            self._shed_redundant(appended, keep)
        return self.ledger.room(tier, appended)

    def _shed_redundant(self, appended: int, keep: SessionId | None) -> None:
        """Give up host copies whose session is on the device as well, oldest use first, until there is room."""
        redundant = [
            self.sessions[s]
            for s in self.ledger
            if s != keep and 0 < self.ledger.holding(s).host_tokens <= self.ledger.holding(s).device_tokens
        ]
        for session in sorted(redundant, key=lambda s: s.last_used_ns):
            if self.ledger.room(Tier.HOST, appended):
                return
            self._discard_copy(session, Tier.HOST)

    def _discard_copy(self, session: Session, tier: Tier, directive_id: str = "") -> None:
        self.ledger.copied(session.id, tier, 0)
        self._plan.moves.append(Discard(session.id, None, 0, tier, directive_id))

    def _discard_all(self, session: Session, directive_id: str = "") -> None:
        holding = self.ledger.holding(session.id)
        slot = holding.slot
        for tier, tokens in ((Tier.HOST, holding.host_tokens), (Tier.DISK, holding.disk_tokens)):
            if tokens:
                self._discard_copy(session, tier)
        self.ledger.leave_device(session.id)
        if slot is not None:
            self._plan.moves.append(Discard(session.id, slot, 0, Tier.DEVICE, directive_id))

    def _truncate(self, session: Session, to_tokens: int, directive_id: str = "") -> None:
        """Forget what lies beyond `to_tokens` in every tier; the store cuts its copies when it next uses them."""
        slot = self.ledger.holding(session.id).slot
        self.ledger.truncate(session.id, to_tokens)
        if slot is not None:
            self._plan.moves.append(Discard(session.id, slot, to_tokens, Tier.DEVICE, directive_id))

    def diverged(self, session: Session, common_tokens: int) -> None:
        """The next prompt shares only `common_tokens` with what is held: forget the rest. Call before `submit`."""
        session.computed_high_tokens = min(session.computed_high_tokens, common_tokens)
        if self.ledger.holding(session.id).longest()[1] > common_tokens:
            self._truncate(session, common_tokens)

    def _forget(self, session: Session) -> None:
        self._discard_all(session)
        self.ledger.forget(session.id)
        del self.sessions[session.id]
        self._plan.forgotten.append(session.id)

    def _move_in(self, session: Session, slot: Slot, tier: Tier, directive_id: str) -> None:
        tokens = self.ledger.holding(session.id).longest()[1]
        self.ledger.restored(session.id, tokens)
        self._plan.moves.append(MoveIn(session.id, slot, tier, tokens, directive_id))

    def _preempt(self, turn: Turn, directive_id: str, tier: Tier | None = None) -> None:
        del self.running[turn.session_id]
        self.waiting[turn.session_id] = turn
        turn.preempted_count += 1
        to_tier = self._evict(self.sessions[turn.session_id], tier, directive_id)
        self._plan.preempted.append(PreemptedTurn(turn.session_id, to_tier, directive_id))

    # Time

    def _expire(self, now_ns: int) -> None:
        for session in list(self.sessions.values()):
            if session.held_until_ns is not None and session.held_until_ns <= now_ns:
                session.held_until_ns = None
            if session.pinned_until_ns is not None and session.pinned_until_ns <= now_ns:
                session.pinned_until_ns = None
            if session.turn is None and session.last_used_ns + self.config.forget_ns <= now_ns:
                self._forget(session)

    def _next_wake(self) -> int | None:
        times = [s.held_until_ns for s in self.sessions.values() if s.held_until_ns is not None]
        times += [d.deadline_ns for d in self._deferred]
        return min(times, default=None)

    def release_holds(self) -> None:
        """Every hold ends: the daemon that made them is gone."""
        for session in self.sessions.values():
            session.held_until_ns = None

    # Directives

    def apply(self, directive: Directive, now_ns: int) -> Outcome:
        """Carry out one directive, or say why not. Moves it causes are part of the next plan."""
        if directive.deadline_ns <= now_ns:
            return _outcome(directive, OutcomeStatus.EXPIRED, "the deadline passed before it reached a step border")
        match directive:
            case ask.SetTenantWeight():
                return self._set_weight(directive)
            case ask.SetCapacity():
                return self._set_capacity(directive, now_ns)
            case ask.SetHostTierCapacity():
                return self._set_host_capacity(directive)
            case _:
                session = self.sessions.get(directive.session_id)
                if session is None:
                    return _outcome(directive, OutcomeStatus.REJECTED, f"no session {directive.session_id}")
                return self._apply_to_session(directive, session, now_ns)

    def _apply_to_session(
        self,
        directive: ask.Hold | ask.Release | ask.Preempt | ask.SwapOut | ask.SwapIn | ask.Retain | ask.Drop,
        session: Session,
        now_ns: int,
    ) -> Outcome:
        match directive:
            case ask.Hold():
                return self._hold(directive, session, now_ns)
            case ask.Release():
                session.held_until_ns = None
                return _outcome(directive, OutcomeStatus.COMPLETED)
            case ask.Preempt():
                if (turn := self.running.get(session.id)) is None:
                    return _outcome(directive, OutcomeStatus.REJECTED, "no turn of the session is running")
                tier = Tier.NONE if directive.mode is ask.PreemptMode.RECOMPUTE else None
                self._preempt(turn, directive.directive_id, tier)
                return _outcome(directive, OutcomeStatus.ACCEPTED)
            case ask.SwapOut():
                return self._swap_out(directive, session, now_ns)
            case ask.SwapIn():
                return self._swap_in(directive, session, now_ns)
            case ask.Retain():
                ttl_ns = min(directive.ttl_ns, MAX_TTL_NS)
                session.pinned_until_ns = now_ns + ttl_ns
                session.retain_until_ns = max(session.retain_until_ns, session.pinned_until_ns)
                if not self.ledger.holding(session.id).device_tokens:
                    return _outcome(directive, OutcomeStatus.CLIPPED, "not on the device: kept once it is back there")
                if ttl_ns < directive.ttl_ns:
                    return _outcome(directive, OutcomeStatus.CLIPPED, "ttl cut to 1 h")
                return _outcome(directive, OutcomeStatus.COMPLETED)
            case ask.Drop():
                return self._drop(directive, session)
            case _:
                assert_never(directive)

    def _set_weight(self, directive: ask.SetTenantWeight) -> Outcome:
        if not 0 < directive.weight <= MAX_WEIGHT:
            return _outcome(directive, OutcomeStatus.REJECTED, f"weight {directive.weight}: give one in (0, 1000]")
        self.service.set_weight(directive.tenant_id, directive.weight)
        return _outcome(directive, OutcomeStatus.COMPLETED)

    def _set_capacity(self, directive: ask.SetCapacity, now_ns: int) -> Outcome:
        wanted = max(1, min(directive.device_tokens, self.physical_tokens))
        self.ledger.device_capacity_tokens = wanted
        if self.ledger.device_free_tokens < 0:
            self._make_room(-self.ledger.device_free_tokens, now_ns, _Reach.UNPINNED)
        if wanted != directive.device_tokens:
            return _outcome(
                directive, OutcomeStatus.CLIPPED, f"set to {wanted}: the context has {self.physical_tokens}"
            )
        return _outcome(directive, OutcomeStatus.COMPLETED)

    def _set_host_capacity(self, directive: ask.SetHostTierCapacity) -> Outcome:
        """Lower or raise the host tier; copies that no longer fit go to disk where there is room, else away."""
        self.ledger.host_capacity_bytes = max(0, directive.host_bytes)
        self._shed_redundant(0, None)
        idle = [self.sessions[s] for s in self.ledger if self.ledger.holding(s).host_tokens]
        for session in sorted(idle, key=lambda s: (s.turn is not None, s.last_used_ns)):
            if self.ledger.room(Tier.HOST, 0):
                break
            self._discard_copy(session, Tier.HOST)
        return _outcome(directive, OutcomeStatus.COMPLETED)

    def _hold(self, directive: ask.Hold, session: Session, now_ns: int) -> Outcome:
        ttl_ns = min(directive.ttl_ns, MAX_TTL_NS)
        session.held_until_ns = now_ns + ttl_ns
        if (turn := self.running.pop(session.id, None)) is not None:
            self.waiting[session.id] = turn  # its KV stays where it is until somebody needs the room
        if ttl_ns < directive.ttl_ns:
            return _outcome(directive, OutcomeStatus.CLIPPED, "ttl cut to 1 h")
        return _outcome(directive, OutcomeStatus.COMPLETED)

    def _swap_out(self, directive: ask.SwapOut, session: Session, now_ns: int) -> Outcome:
        if directive.tier not in (Tier.HOST, Tier.DISK):
            return _outcome(directive, OutcomeStatus.REJECTED, "tier: give host or disk")
        if session.id in self.running:
            self._defer(directive)
            return _outcome(directive, OutcomeStatus.DEFERRED, "its turn is running: done when the turn ends")
        holding = self.ledger.holding(session.id)
        if not holding.device_tokens:
            where = holding.longest()[0]
            status = OutcomeStatus.COMPLETED if where is directive.tier else OutcomeStatus.REJECTED
            return _outcome(directive, status, f"nothing on the device; held in {where.value}")
        valid = holding.host_tokens if directive.tier is Tier.HOST else holding.disk_tokens
        if not self._host_room(directive.tier, max(0, holding.device_tokens - valid), session.id):
            return _outcome(directive, OutcomeStatus.REJECTED, f"no room in the {directive.tier.value} tier")
        self._evict(session, directive.tier, directive.directive_id)
        return _outcome(directive, OutcomeStatus.ACCEPTED)

    def _swap_in(self, directive: ask.SwapIn, session: Session, now_ns: int) -> Outcome:
        tier, tokens = self.ledger.holding(session.id).longest()
        if tier is Tier.DEVICE:
            return _outcome(directive, OutcomeStatus.COMPLETED, "already on the device")
        if tier is Tier.NONE:
            return _outcome(directive, OutcomeStatus.REJECTED, "nothing is held: the next turn computes it")
        missing = tokens - self.ledger.holding(session.id).device_tokens - self.ledger.device_free_tokens
        if missing > 0:
            self._make_room(missing, now_ns, _Reach.EXPIRED, keep={session.id})
        if not self._has_slot(session):
            self._make_slot(now_ns, _Reach.EXPIRED, {session.id})
        missing = tokens - self.ledger.holding(session.id).device_tokens - self.ledger.device_free_tokens
        if missing > 0 or not self._has_slot(session):
            self._defer(directive)
            return _outcome(directive, OutcomeStatus.DEFERRED, "no room on the device yet")
        self._move_in(session, self.ledger.open(session.id), tier, directive.directive_id)
        session.retain_until_ns = now_ns + self.config.retain_ns
        return _outcome(directive, OutcomeStatus.ACCEPTED)

    def _drop(self, directive: ask.Drop, session: Session) -> Outcome:
        if session.id in self.running:
            return _outcome(directive, OutcomeStatus.REJECTED, "its turn is running: preempt it instead")
        held = self.ledger.holding(session.id).longest()[1]
        if directive.from_token >= held:
            return _outcome(directive, OutcomeStatus.COMPLETED, f"only {held} tokens are held")
        if directive.from_token > 0:
            self._truncate(session, directive.from_token, directive.directive_id)
        else:
            self._discard_all(session, directive.directive_id)
        return _outcome(directive, OutcomeStatus.COMPLETED)

    def _defer(self, directive: ask.SwapOut | ask.SwapIn) -> None:
        if all(directive.directive_id != waiting.directive_id for waiting in self._deferred):
            self._deferred.append(directive)

    def _retry_deferred(self, now_ns: int) -> None:
        pending, self._deferred = self._deferred, []
        for directive in pending:
            outcome = self.apply(directive, now_ns)
            if outcome.status is not OutcomeStatus.DEFERRED:
                self._plan.outcomes.append(outcome)

    def tenants(self) -> set[TenantId]:
        return {session.tenant_id for session in self.sessions.values()}


def _outcome(directive: Directive, status: OutcomeStatus, reason: str = "") -> Outcome:
    return Outcome(directive.directive_id, status, reason)
