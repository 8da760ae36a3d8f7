"""Decides, at each step border, who computes what.

Owns: the queue, the order of tenants (token_service.py), admission (admission.py), the batch, preemption, holds, and
the retention marks; where KV lives it leaves to placement.py, what a daemon asks to directing.py. Pure: no binding, no
clock, no threads; time enters as `now_ns`, decisions leave as a StepPlan that the engine carries out. Must not: move
bytes, sample, or know text.

Longer than most: queue, admission and batch are one decision over the same turns, sessions and plan. What could stand
alone does (admission.py, prefix_groups.py, slo.py, placement.py, directing.py).

Rules
- Continuous batching: every step carries one token of each decoding turn and chunks of the prompts, within step_tokens.
- Order: the tenant with the least weighted service first; within a tenant the least margin to its SLO (slo.py), then
  the oldest turn, members of a prefix group next to each other. So an SLO or a group buys no place from other tenants
  (JITServe's order inside VTC's shares).
- A turn is passed over while another of its tenant computes a prefix it will share, for a bounded number of steps
  (prefix_groups.py). The tenant is charged for the prefix once (token_service.py).
- A step's prompts are cut to what lets each decoding turn keep its wished pace, as far as the cost model knows, but
  never below paced_prefill_tokens, nor below mixed_prefill_tokens where somebody waits for the prompt's first token:
  a prefill always goes on.
- A turn is admitted when its whole prompt fits and the Past-Future peak of the batch stays below capacity. Admission
  stops at the first turn that does not fit: a small turn never overtakes a large one for good.
- A tenant below its weighted share of a full batch's places takes one from the tenant furthest above its own, unless
  it has had more service than that one.
- A directed retention is broken only where nothing could run otherwise.
- A running turn loses its place only when the running ones outgrow capacity: the most-served tenant's youngest goes.
- A turn that runs alone may always go on: progress does not depend on a capacity that was lowered under it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .admission import OutputLengths, peak_tokens
from .cost_figures import CostFigures
from .ledger import Ledger
from .placement import Donor, Placement, Reach
from .plan import PreemptedTurn, Slice, StepPlan
from .prefix_groups import PrefixGroups
from .sequence import IdlePolicy, Session, SessionId, SessionPhase, TenantId, Tier, Turn
from .slo import due_ns, prefill_seconds_allowed
from .token_service import TokenService

# Looking for sessions to forget goes through all of them, and nobody waits for it.
_SWEEP_PERIOD_NS = 10**9


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    step_tokens: int = 256
    """Most tokens of one step, prompts and outputs together."""
    mixed_prefill_tokens: int = 64
    """Most prompt tokens of a step that also decodes: bounds the pause a long prompt puts between two outputs."""
    paced_prefill_tokens: int = 16
    """Fewest prompt tokens of such a step while prompts wait, whatever pace a decoding turn wishes."""
    max_running: int = 16
    idle_policy: IdlePolicy = IdlePolicy.RETAIN
    retain_ns: int = 30 * 10**9
    """The engine's own retention after a turn."""
    forget_ns: int = 3600 * 10**9
    """A session unused for so long is forgotten in every tier."""
    share_prefix_tokens: int | None = None
    """Share prefixes of at least so many tokens between sessions (unified context only); None: never."""
    group_wait_steps: int = 512
    """Most steps a turn is passed over because another computes a prefix it will share; 0: never."""
    admission_quantile: float = 0.8
    watermark_ratio: float = 0.01
    """Of capacity, left free where a turn is admitted beside others: an estimate a little too low, and with it a turn
    preempted as soon as it was admitted, would repeat for ever."""
    admit_full_output: bool = False
    """Reserve every turn's whole max_tokens (no Past-Future): the cautious baseline."""


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
        self.placement = Placement(ledger, self.sessions, self.running, self.service)
        self.groups = PrefixGroups(ledger, config.share_prefix_tokens, config.group_wait_steps)
        self.cost = CostFigures()
        """What computing takes here; without figures no wished pace shortens a prompt's chunk."""
        self._sweep_ns = 0
        self._plan = StepPlan()

    # Turns

    def submit(self, session: Session, turn: Turn) -> None:
        """Queue a turn. The session's tokens are its whole prompt, and the ledger holds a true prefix of them."""
        assert session.turn is None, f"{session.id}: one turn at a time"
        session.turn = turn
        # The prompt's last token is computed in any case, for its logits: that recomputes nothing that was dropped.
        session.computed_high_tokens = min(session.computed_high_tokens, turn.prompt_tokens - 1)
        self.sessions[session.id] = session
        self.waiting[session.id] = turn
        self.service.arrive(turn.tenant_id)
        if not self.ledger.holding(session.id).longest()[1]:
            self.groups.arrive(turn, session.tokens)

    def diverged(self, session: Session, common_tokens: int) -> None:
        """The next prompt shares only `common_tokens` with what is held: forget the rest. Call before `submit`."""
        session.computed_high_tokens = min(session.computed_high_tokens, common_tokens)
        if self.ledger.holding(session.id).longest()[1] > common_tokens:
            self.placement.truncate(session, common_tokens)

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
        self.groups.leave(session_id)
        self.service.leave(turn.tenant_id)
        if completed:
            self.lengths.add(turn.output_tokens)
        if session.ephemeral:
            self._forget(session)
        elif self.config.idle_policy is IdlePolicy.DROP:
            self.placement.discard_all(session)
        elif self.config.idle_policy is IdlePolicy.SWAP and session.pinned_until_ns is None:
            self.placement.evict(session)

    def withdraw(self, session_id: SessionId, now_ns: int) -> None:
        """Take the session's turn out of the queues without ending it; its KV stays, the session is idle."""
        session = self.sessions[session_id]
        assert session.turn is not None
        self.running.pop(session_id, None)
        self.waiting.pop(session_id, None)
        self.groups.leave(session_id)
        self.service.leave(session.turn.tenant_id)
        session.turn = None
        session.last_used_ns = now_ns

    def forget(self, session_id: SessionId) -> None:
        """Forget an idle session in every tier. Safe where there is none."""
        if (session := self.sessions.get(session_id)) is not None:
            assert session.turn is None, f"{session_id}: has a turn"
            self._forget(session)

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
        if start + count >= turn.prompt_tokens:
            self.groups.leave(session_id)

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
        session = self.sessions.get(session_id)
        if session is not None and session.turn is not None and session.turn.output_tokens == 0:
            session.turn.cached_tokens = 0  # it was to begin with what could not be read back

    def copy_lost(self, session_id: SessionId, tier: Tier) -> None:
        """A copy below the device is gone; what the device holds is untouched."""
        if session_id in self.ledger:
            self.ledger.copied(session_id, tier, 0)

    def phase(self, session: Session) -> SessionPhase:
        if session.held_until_ns is not None:
            return SessionPhase.HELD
        if session.id in self.running:
            return SessionPhase.RUNNING
        return SessionPhase.WAITING if session.id in self.waiting else SessionPhase.IDLE

    def busy(self) -> bool:
        """Whether a turn could use a step now, or moves wait to be carried out."""
        if self.running or self.placement.moves or self._plan.preempted:
            return True
        return any(self.sessions[s].held_until_ns is None for s in self.waiting)

    # The step

    def plan(self, now_ns: int) -> StepPlan:
        """Decide the next step and book it: the ledger already says what will hold once the plan is carried out,
        except for the tokens of the slices, which `computed` books."""
        self._expire(now_ns)
        self.placement.make_room(-self.ledger.device_free_tokens, now_ns, Reach.UNPINNED)
        self._admit(now_ns)
        self._batch(now_ns)
        plan, self._plan = self._plan, StepPlan()
        plan.moves = self.placement.take_moves()
        return plan

    def _ordered(self, turns: Iterable[Turn]) -> list[Turn]:
        """Least-served tenant first; within it the turn with the least margin to its SLO, then the oldest, beside those
        of its prefix group."""

        def rank(turn: Turn) -> tuple[float, float, int, int]:
            due = due_ns(turn, self.cost)
            margin = float("inf") if due is None else due
            return (self.service.counter(turn.tenant_id), margin, self.groups.standing_ns(turn), turn.arrival_ns)

        return sorted(turns, key=rank)

    # Admission

    def _admit(self, now_ns: int) -> None:
        if not self.waiting:
            return
        self.groups.begin_step()
        for turn in self._ordered(t for s, t in self.waiting.items() if self.sessions[s].held_until_ns is None):
            if self.groups.passes_over(turn):
                continue
            if len(self.running) >= self.config.max_running and not self._take_seat(turn):
                return
            if not self._find_room(turn, now_ns):
                return
            self._enter(turn, now_ns)

    def _take_seat(self, turn: Turn) -> bool:
        """Free a place in a full batch for a tenant that has less than its weighted share of the places.

        The place comes from the tenant furthest above its share; its youngest turn pauses, KV in place, so nothing is
        copied unless the room is needed. A tenant that floods can so not keep others waiting for one of its turns to
        end.
        """
        seats: dict[TenantId, int] = {}
        for running in self.running.values():
            seats[running.tenant_id] = seats.get(running.tenant_id, 0) + 1
        wanting = {turn.tenant_id, *seats}
        total_weight = sum(self.service.weight(tenant_id) for tenant_id in wanting)

        def above_share(tenant_id: TenantId) -> float:
            share = self.config.max_running * self.service.weight(tenant_id) / total_weight
            return seats.get(tenant_id, 0) - share

        richest = max(seats, key=above_share)
        # A whole place on both sides, or two tenants would trade it back and forth.
        if above_share(turn.tenant_id) > -1 or above_share(richest) < 1:
            return False
        # Places are not service: where the richest in places has had less of it, the places are how it catches up.
        if self.service.counter(turn.tenant_id) > self.service.counter(richest):
            return False
        youngest = max((t for t in self.running.values() if t.tenant_id == richest), key=lambda t: t.arrival_ns)
        self.pause(youngest.session_id)
        return True

    def _find_room(self, turn: Turn, now_ns: int) -> bool:
        """Make room for the turn beside the running ones, and take over the prefix another has; False: not now."""
        session = self.sessions[turn.session_id]
        donor = self._donor(session)
        reach = Reach.UNPINNED if self.running else Reach.PINNED
        keep = {session.id}
        if self.running and self._missing_room(turn) > self.placement.reclaimable(now_ns, reach, keep):
            # Perhaps beside its donor, whose cells it then need not have twice.
            if donor is None:
                return False
            keep.add(donor.session_id)
            if self._missing_room(turn) - donor.tokens > self.placement.reclaimable(now_ns, reach, keep):
                return False
        # Shared before the room is made: whoever leaves then, its shared cells stay.
        if donor is not None and self.placement.ensure_slot(session, now_ns, reach, {donor.session_id}):
            self.placement.share(session, donor)
        elif not self.placement.ensure_slot(session, now_ns, reach):
            return False
        self.placement.make_room(self._missing_room(turn), now_ns, reach, keep)
        return True

    def _donor(self, session: Session) -> Donor | None:
        if self.config.share_prefix_tokens is None or self.ledger.holding(session.id).longest()[1]:
            return None
        return self.placement.find_donor(session, self.config.share_prefix_tokens)

    def _missing_room(self, turn: Turn) -> int:
        """Tokens that must leave for the batch's peak with the turn in it to fit; negative: so much is free."""
        batch = [*self.running.values(), turn]
        peak = peak_tokens((len(self.sessions[t.session_id].tokens), self._left(t)) for t in batch)
        # Gross on both sides: what sharing spares within the batch stays spared in `others`.
        in_batch = sum(self.ledger.holding(t.session_id).device_tokens for t in batch)
        others = self.ledger.device_used_tokens - in_batch
        capacity = self.ledger.device_capacity_tokens
        if self.running:
            capacity -= int(capacity * self.config.watermark_ratio)
        return peak + others - capacity

    def _left(self, turn: Turn) -> int:
        """Output tokens the turn will likely still produce."""
        if self.config.admit_full_output:
            return turn.max_output_tokens - turn.output_tokens
        return self.lengths.remaining(turn.output_tokens, turn.max_output_tokens, self.config.admission_quantile)

    def _enter(self, turn: Turn, now_ns: int) -> None:
        session = self.sessions[turn.session_id]
        held = self.ledger.holding(session.id).longest()[1]
        self.placement.move_in(session)
        # At least the last token is computed, or there would be nothing to sample from.
        last = len(session.tokens) - 1
        if held > last:
            self.placement.truncate(session, last)
        if turn.admitted_ns is None:
            turn.admitted_ns = now_ns
            turn.cached_tokens = min(held, last)
            self._plan.admitted.append(session.id)
        del self.waiting[session.id]
        self.running[session.id] = turn
        self.groups.enter(session.id)

    # The batch

    def _batch(self, now_ns: int) -> None:
        """Fill the step: decoding turns first, then prompts in order of service."""
        turns = self._ordered(self.running.values())
        left = {t.session_id: self._missing_tokens(t) for t in turns}
        decoding = [t for t in turns if left[t.session_id] == 1]
        budget = self.config.step_tokens - len(decoding)
        counts = {t.session_id: 1 for t in decoding}
        # Prompts in the order their turns entered, which was that of service. First those whose first token somebody
        # waits for: they take what they need, and no other prompt shares their step.
        awaited = [t for t in self.running.values() if t.due_ns is not None and t.output_tokens == 0]
        prefilling = [t for t in awaited or self.running.values() if left[t.session_id] > 1]
        if decoding and not awaited:
            budget = min(budget, self.config.mixed_prefill_tokens)
        seconds = prefill_seconds_allowed(decoding, self.cost, now_ns)
        assured = self.config.mixed_prefill_tokens if awaited else self.config.paced_prefill_tokens
        for turn in prefilling:
            count = min(left[turn.session_id], budget)
            if seconds is not None:
                held = self.ledger.holding(turn.session_id).device_tokens
                count = min(count, max(assured, self.cost.prefill_tokens_within(seconds, held)))
                seconds -= self.cost.prefill_seconds(held + count, held)
                assured -= count
            if count > 0:
                counts[turn.session_id] = count
                budget -= count
        self._fit_batch(counts, turns, now_ns)
        for session_id, count in counts.items():
            holding = self.ledger.holding(session_id)
            assert holding.slot is not None
            samples = count == left[session_id]
            self._plan.slices.append(Slice(session_id, holding.slot, holding.device_tokens, count, samples))

    def _missing_tokens(self, turn: Turn) -> int:
        return len(self.sessions[turn.session_id].tokens) - self.ledger.holding(turn.session_id).device_tokens

    def _fit_batch(self, counts: dict[SessionId, int], order: list[Turn], now_ns: int) -> None:
        """Make the step's growth fit: room from those not computing, else shorter chunks, else preemption."""

        def short() -> int:
            return sum(counts.values()) - self.ledger.device_free_tokens

        self.placement.make_room(short(), now_ns, Reach.UNPINNED)
        # Shorten prompts from the back of the order: nobody loses what is already computed.
        for turn in reversed(order):
            if short() <= 0:
                return
            if (count := counts.get(turn.session_id, 0)) > 1:
                counts[turn.session_id] = max(1, count - short())
        for turn in reversed(order):
            if short() <= 0:
                return
            if len(self.running) == 1:
                self.placement.make_room(short(), now_ns, Reach.PINNED)
                return
            counts.pop(turn.session_id, None)
            self.preempt(turn)

    def preempt(self, turn: Turn, *, tier: Tier | None = None, directive_id: str = "") -> None:
        """Take a running turn out of the batch and queue it again; its KV leaves the device (see Placement.evict)."""
        self.pause(turn.session_id)
        turn.preempted_count += 1
        to_tier = self.placement.evict(self.sessions[turn.session_id], tier)
        self._plan.preempted.append(PreemptedTurn(turn.session_id, to_tier, directive_id))

    def pause(self, session_id: SessionId) -> None:
        """Take a running turn out of the batch but leave its KV where it is until somebody needs the room.

        One that waits only leaves its prefix group: no other turn stands or waits on its behalf.
        """
        self.groups.leave(session_id)
        if (turn := self.running.pop(session_id, None)) is not None:
            self.waiting[session_id] = turn

    # Time

    def _expire(self, now_ns: int) -> None:
        """End holds and pins whose time is up; `plan` tells when the next hold ends."""
        wake_ns: int | None = None
        for session in self.sessions.values():
            if session.held_until_ns is None and session.pinned_until_ns is None:
                continue
            if session.pinned_until_ns is not None and session.pinned_until_ns <= now_ns:
                session.pinned_until_ns = None
            if session.held_until_ns is not None:
                if session.held_until_ns <= now_ns:
                    session.held_until_ns = None
                else:
                    wake_ns = min(wake_ns or session.held_until_ns, session.held_until_ns)
        self._plan.wake_ns = wake_ns
        if now_ns >= self._sweep_ns:
            self._sweep_ns = now_ns + _SWEEP_PERIOD_NS
            for session in list(self.sessions.values()):
                if session.turn is None and self._forgettable(session, now_ns):
                    self._forget(session)

    def _forgettable(self, session: Session, now_ns: int) -> bool:
        """Long unused; or it holds nothing and no client knows its name, so that nobody would miss it."""
        if session.last_used_ns + self.config.forget_ns <= now_ns:
            return True
        return session.anonymous and not self.ledger.holding(session.id).longest()[1]

    def forget_oldest(self) -> None:
        """Forget the idle session unused longest, one nobody named first. A no-op where every session has a turn."""
        idle = [session for session in self.sessions.values() if session.turn is None]
        if idle:
            self._forget(min(idle, key=lambda session: (not session.anonymous, session.last_used_ns)))

    def _forget(self, session: Session) -> None:
        self.placement.discard_all(session)
        self.ledger.forget(session.id)
        del self.sessions[session.id]
        self._plan.forgotten.append(session.id)

    def release_holds(self) -> None:
        """Every hold ends: the daemon that made them is gone."""
        for session in self.sessions.values():
            session.held_until_ns = None
