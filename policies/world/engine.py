"""A serving engine in virtual time: turns wait for room, KV is brought back, prompts are computed, tokens drawn.

Owns the life of a turn and the engine's own behaviour under a rule: whom it serves next, who makes room, what it
fetches or writes ahead. Where KV is, `tiers.py` keeps; what is computed, `compute.py`. It knows no agents and no
tools: the world says when a turn is asked for, and is told when one is over.

A turn's room is given whole: the engine is taken to know how long an output will be, for every rule alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from ..accounting import Work
from ..model import KvTier, SessionId
from .compute import Compute
from .door import Door
from .machine import TURN_S, Machine
from .rules import PREFILL_WEIGHT, Rule, Service, waiting_order
from .score import Tally
from .seat import COMPUTED, Seat, Stage
from .tiers import Tiers
from .waits import Waits

LOOK_AGAIN_S = 1.0
"""Who waits is looked at again after this, whatever happens: order changes with age."""
FETCH_FACTOR, FETCH_AHEAD_S = 1.5, 0.3
"""KV is fetched once its call is expected to end within this many times the fetch, and so much more."""
FETCH_FREE_RATIO = 0.05
"""Of the device that fetching ahead leaves free."""
LANE_FREE_S = 0.2
"""Fetching ahead waits for link and disk to be free within this."""
HALVINGS = 20


class Engine:
    """Its seats are in the order of their numbers; sessions never leave, they close."""

    def __init__(
        self,
        machine: Machine,
        device_tokens: int,
        disk_bytes: float,
        host_capacity_bytes: Callable[[], float],
        rule: Rule,
        tenants: Mapping[SessionId, tuple[str, float]],
        tally: Tally,
    ) -> None:
        """`tenants`: of each session its tenant and that tenant's weight."""
        self.now_s = 0.0
        self.rule = rule
        self.tally = tally
        self.waits = Waits()
        self.machine = machine
        self.compute = Compute(machine)
        self.tiers = Tiers(machine, device_tokens, disk_bytes, host_capacity_bytes, rule, tally)
        self.seats = [Seat(n, session, *tenant) for n, (session, tenant) in enumerate(tenants.items())]
        self.seat_of = {seat.session: seat for seat in self.seats}
        self.service = Service()
        self.door = Door(rule.door)
        self._loading: list[Seat] = []
        self._look_s = inf

    # -- what a rule may see (rules.Look)

    @property
    def device_tokens(self) -> int:
        return self.tiers.device_tokens

    @property
    def disk_present(self) -> bool:
        return self.tiers.disk_capacity_tokens > 0

    def restore_s(self, seat: Seat, tier: KvTier) -> float:
        """Seconds to have its context on the device again were it in `tier`, no queue counted."""
        size = seat.context_tokens * self.machine.bytes_per_token
        match tier:
            case KvTier.DEVICE:
                return 0.0
            case KvTier.HOST:
                return size / self.machine.cost.host_bytes_per_second
            case KvTier.DISK:
                return size / self.machine.cost.disk_bytes_per_second if self.disk_present else inf
            case KvTier.NONE:
                return self.machine.prefill_s(seat.context_tokens)

    def wait_s(self, seat: Seat) -> float:
        if not seat.kind:
            return 0.0
        return self.waits.residual_s(seat.kind, max(0.0, self.now_s - seat.call_since_s - seat.call_lost_s))

    def age_rank(self, seat: Seat) -> float:
        return self.service.served.get(seat.tenant, 0.0)

    # -- time

    def next_s(self) -> float:
        return min(self.compute.next_s(), min((s.ready_s for s in self._loading), default=inf), self._look_s)

    def advance(self, to_s: float) -> None:
        """Time passes; to_s must not lie beyond next_s()."""
        idle = self.tiers.device_tokens - sum(s.held_tokens for s in self.seats if s.stage in COMPUTED)
        self.tally.idle_byte_seconds += idle * self.machine.bytes_per_token * (to_s - self.now_s)
        before = self.compute.prefill_s
        self.compute.advance(to_s)
        self.tally.prefill_s += self.compute.prefill_s - before
        self.now_s = to_s

    def step(self) -> list[Seat]:
        """What is done now: loads, prompts, turns. Answers the seats whose turn is over."""
        for seat in [s for s in self._loading if s.ready_s <= self.now_s]:
            self._loading.remove(seat)
            seat.stage = Stage.PREFILL
            self.compute.prefill(seat)
        for seat in self.compute.prefilled():
            self._first_token(seat)
        over = self.compute.decoded()
        for seat in over:
            self._end(seat)
        if over or self._look_s <= self.now_s:
            self.serve()
        return over

    # -- turns

    def ask(self, seat: Seat, prompt_tokens: int, output_tokens: int) -> None:
        """A turn is asked for. Its context may be shorter than the last one: what lies beyond is cut."""
        self.service.active(seat.tenant, {s.tenant for s in self.seats if s.stage is not Stage.IDLE})
        seat.prompt_tokens, seat.output_tokens = prompt_tokens, output_tokens
        seat.stage, seat.asked_s, seat.kind = Stage.WAITING, self.now_s, ""
        if seat.context_tokens > prompt_tokens:
            self.tiers.cut(seat, prompt_tokens)
            seat.context_tokens = prompt_tokens
        self.serve()

    def close(self, seat: Seat) -> None:
        """Its conversation is over; the seat may take another."""
        self.tiers.forget(seat)
        seat.context_tokens = seat.turn = 0
        seat.stage, seat.asleep, seat.kind, seat.hold_until_s = Stage.IDLE, False, "", 0.0
        self.serve()

    def hold(self, seat: Seat, until_s: float) -> bool:
        """Not to be served before `until_s`; False where its turn has its room already."""
        if seat.stage in COMPUTED:
            return False
        seat.hold_until_s = until_s
        return True

    def release(self, seat: Seat) -> None:
        seat.hold_until_s = 0.0
        self.serve()

    def serve(self) -> None:
        """Give room to whoever waits, in the rule's order, as far as it can be made; then use what is idle."""
        waiting = [s for s in self.seats if s.stage is Stage.WAITING]
        for seat in sorted(waiting, key=lambda s: waiting_order(self.rule, self, s)):
            if seat.hold_until_s > self.now_s:
                continue
            if not self.door.admits(seat, self.seats, self._reach_tokens()):
                continue
            room_s = self._make_room(seat)
            if room_s is not None:
                self._begin(seat, room_s)
        self.ahead()
        still = any(s.stage is Stage.WAITING for s in waiting)
        self._look_s = self.now_s + LOOK_AGAIN_S if still else inf

    def _reach_tokens(self) -> float:
        """Device and host tier together: what the awake may fill without recomputing."""
        below = self.tiers.host_capacity_bytes() / self.machine.bytes_per_token if self.rule.swaps else 0.0
        return self.tiers.capacity_tokens + below

    def _make_room(self, seat: Seat) -> float | None:
        """When the room it needs is free; None: it can not be made now."""
        tiers = self.tiers
        need = seat.needs_tokens - (seat.held_tokens if seat.tier is KvTier.DEVICE else 0)
        short = need - tiers.free_tokens
        if short <= 0:
            return self.now_s
        there = [s for s in self.seats if s is not seat and s.tier is KvTier.DEVICE and s.stage not in COMPUTED]
        if short > sum(s.held_tokens for s in there):
            return None
        free_s = self.now_s
        for victim in sorted(there, key=self._victim_order):
            free_s = max(free_s, tiers.move(victim, tiers.place_below(victim, self.seats, self), self.now_s))
            if tiers.free_tokens >= need:
                break
        return free_s

    def _victim_order(self, seat: Seat) -> tuple[bool, bool, float, int]:
        """Idle sessions first, retained ones last among them; of those that wait, who came last."""
        if seat.stage is Stage.WAITING:
            return (True, False, -seat.asked_s, seat.number)
        worth = self.rule.worth(self, seat, KvTier.DEVICE)
        return (False, seat.retain_until_s > self.now_s, worth, seat.number)

    def _begin(self, seat: Seat, room_s: float) -> None:
        tiers, held = self.tiers, seat.held_tokens
        skipped = self._computed_instead(seat) if seat.tier is KvTier.DISK and self.rule.meet else 0
        again_s = self.machine.prefill_s(skipped)
        there_s = tiers.load(seat, skipped, self.now_s)
        tiers.booked_tokens += seat.needs_tokens - held
        again = (seat.context_tokens if not held else 0) + skipped
        self.tally.recomputed_tokens += again
        self.tally.work += Work(prefill_tokens=seat.prompt_tokens - held + skipped, wasted_tokens=again)
        seat.work_s = TURN_S + again_s + self.machine.prefill_s(seat.prompt_tokens, held)
        seat.ready_s = max(room_s, there_s - again_s)
        seat.cached_tokens, seat.again_tokens, seat.began_s = held - skipped, again, self.now_s
        seat.stage, seat.asleep, seat.retain_until_s = Stage.LOADING, False, 0.0
        self._loading.append(seat)

    def _computed_instead(self, seat: Seat) -> int:
        """Tokens at the head of a context on disk that are computed while the tail is read, both queues counted.

        The two meet where both end at once; by bisection, since prefill is quadratic.
        """
        decoding = self.compute.batch_size
        weight = 1.0 + (PREFILL_WEIGHT - 1.0) * min(1.0, decoding / 4)
        backlog_s = self.compute.backlog_s()
        disk_s = max(0.0, self.tiers.disk_free_s - self.now_s)
        read_s = self.restore_s(seat, KvTier.DISK) / max(1, seat.context_tokens)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            head_s = weight * (backlog_s + self.machine.prefill_s(int(share * seat.held_tokens)))
            if head_s < disk_s + (1.0 - share) * seat.held_tokens * read_s:
                low = share
            else:
                high = share
        return seat.held_tokens if low > 0.95 else int(low * seat.held_tokens) if low > 0.05 else 0

    def _first_token(self, seat: Seat) -> None:
        grown = seat.prompt_tokens - seat.held_tokens
        self.door.grew(seat, seat.prompt_tokens + seat.output_tokens - seat.context_tokens)
        seat.context_tokens = seat.prompt_tokens
        self.tiers.grow(seat, grown)
        self.tiers.booked_tokens -= grown
        seat.stage, seat.first_s = Stage.DECODE, self.now_s
        self.service.serve(seat, grown, 0)
        if seat.resumed:
            self.tally.first_token_s.append(self.now_s - seat.asked_s)
        self.tally.tokens[seat.tenant] = self.tally.tokens.get(seat.tenant, 0) + grown
        self.compute.decode(seat)

    def _end(self, seat: Seat) -> None:
        output = seat.output_tokens
        seat.context_tokens += output
        self.tiers.grow(seat, output)
        self.tiers.booked_tokens -= output
        read = output * seat.prompt_tokens + output * (output + 1) // 2
        self.tally.work += Work(decode_tokens=output, decode_context_tokens=read)
        self.tally.tokens[seat.tenant] = self.tally.tokens.get(seat.tenant, 0) + output
        self.service.serve(seat, 0, output)
        seat.stage, seat.ended_s = Stage.IDLE, self.now_s
        seat.turn += 1

    # -- ahead of need

    def ahead(self) -> None:
        """Fetch what is about to be needed, copy what is about to be in the way: only with what is idle."""
        if self.rule.prefetch:
            self._fetch_ahead()
        if self.rule.behind and self.disk_present and self.tiers.disk_free_s <= self.now_s:
            self._write_behind()

    def _fetch_ahead(self) -> None:
        below = [s for s in self.seats if s.stage is Stage.IDLE and s.kind and s.tier in (KvTier.HOST, KvTier.DISK)]
        for wait_s, _, seat in sorted((self.wait_s(s), s.number, s) for s in below):
            free_s = max(self.tiers.link_free_s, self.tiers.disk_free_s)
            spare = self.tiers.free_tokens - seat.held_tokens
            if free_s > self.now_s + LANE_FREE_S or spare <= FETCH_FREE_RATIO * self.tiers.capacity_tokens:
                continue
            if wait_s < FETCH_FACTOR * self.restore_s(seat, seat.tier) + FETCH_AHEAD_S:
                self.tiers.load(seat, 0, self.now_s)

    def _write_behind(self) -> None:
        """The session that will be evicted next and is not on disk yet, one at a time."""
        idle = [s for s in self.seats if s.stage is Stage.IDLE and s.tier in (KvTier.HOST, KvTier.DEVICE)]
        idle = [s for s in idle if s.disk_tokens < s.held_tokens and self.tiers.disk_room(s, self.seats)]
        least = min(
            idle, key=lambda s: (s.tier is KvTier.DEVICE, self.rule.worth(self, s, s.tier), s.number), default=None
        )
        if least is not None:
            self.tiers.write(least, self.now_s)

    def squeeze(self) -> None:
        """The host tier's room has changed."""
        self.tiers.squeeze(self.seats, self)
