"""What turns cost, counted as they are computed: prefill-token equivalents, energy, and time against the ideal.

Owns: the books of the turns under way, the sums per tenant (a session's stand in the Session) and the engine's totals,
in which other parts count what they do. What the figures mean is policies/accounting.py's to say. Must not: decide
anything. On the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ...policies.accounting import Gamma, TurnCost, Work, gamma_from_times, pte, work_of
from ..energy import EnergyMeter
from .schedule.cost_figures import CostFigures
from .schedule.plan import Slice
from .schedule.sequence import Session, TenantId, Turn, TurnId
from .totals import Totals

READING_PERIOD_NS = 100_000_000
"""Counters are read no more often while turns run on: GPUs renew theirs every 20 to 100 ms, and reading costs 1 ms."""


@dataclass(frozen=True, slots=True)
class TenantCost:
    """Sums over a tenant's turns that have ended. What is not known of a turn is left out: a counter never falls."""

    pte: float = 0.0
    wasted_pte: float = 0.0
    energy_joules: float | None = None
    """None: no turn's energy was measured."""


@dataclass(frozen=True, slots=True)
class AccountsNow:
    """The accounts at one step border."""

    tenants: dict[TenantId, TenantCost]
    totals: Totals
    gamma: Gamma | None
    energy_counters: tuple[str, ...]
    """What is measured: "gpu", "cpu"; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a turn has cost until now; goes with it to another engine."""

    work: Work = field(default_factory=Work)
    energy_joules: float | None = None
    """None: not measured, or not all of it."""


class EnergyShares:
    """Gives what the counters say the device used to the turns computed meanwhile.

    By the seconds that each one's tokens would have taken alone. The device's other users are not told apart, and what
    it uses while no turn is computed is nobody's.
    """

    def __init__(self, meter: EnergyMeter, clock: Callable[[], int]) -> None:
        self._meter = meter
        self._clock = clock
        self._counting = False
        self._since_joules: float | None = None
        self._since_ns = 0
        self._shares: dict[TurnId, float] = {}
        self._joules: dict[TurnId, float | None] = {}

    def begin_step(self) -> None:
        if not self._counting:
            self._read()
            self._counting = True

    def end_step(self, shares: Iterable[tuple[TurnId, float]]) -> None:
        """Each turn computed in the step and its weight, above 0."""
        for turn_id, share in shares:
            self._shares[turn_id] = self._shares.get(turn_id, 0.0) + share
        if self._clock() - self._since_ns >= READING_PERIOD_NS:
            self._share_out()

    def pause(self) -> None:
        """Nothing more is computed for now. Safe to call again."""
        self._share_out()
        self._counting = False

    def open(self, turn_id: TurnId, joules: float | None) -> None:
        """Go on with a turn that has used so much elsewhere."""
        self._joules[turn_id] = joules

    def close(self, turn_id: TurnId) -> float | None:
        """The joules of a turn that ends; None where a counter failed while it ran."""
        self._share_out()
        return self._joules.pop(turn_id, 0.0)

    def _read(self) -> float | None:
        """The joules used since the last reading; None where this one or that one failed."""
        before, self._since_joules = self._since_joules, self._meter.joules()
        self._since_ns = self._clock()
        if before is None or self._since_joules is None or self._since_joules < before:
            return None
        return self._since_joules - before

    def _share_out(self) -> None:
        if not self._shares:
            return
        used, whole = self._read(), sum(self._shares.values())
        for turn_id, share in self._shares.items():
            so_far = self._joules.get(turn_id, 0.0)
            self._joules[turn_id] = None if used is None or so_far is None else so_far + used * share / whole
        self._shares.clear()


class Accounts:
    def __init__(
        self,
        clock: Callable[[], int],
        totals: Totals,
        tabled: Gamma | None = None,
        meter: EnergyMeter | None = None,
    ) -> None:
        """`tabled`: gamma where it need not be measured. `meter`: None where energy cannot be measured."""
        self.cost = CostFigures()
        self._totals = totals
        self._tabled = tabled
        self._energy = EnergyShares(meter, clock) if meter is not None else None
        self._energy_counters = meter.names if meter is not None else ()
        self._work: dict[TurnId, Work] = {}
        self._tenants: dict[TenantId, TenantCost] = {}

    @property
    def gamma(self) -> Gamma | None:
        """None until the cost model is fitted, or where it could not be measured: then no PTE is told."""
        cost = self.cost
        return self._tabled or gamma_from_times(cost.decode_seconds_per_context_token, cost.prefill_seconds_per_token)

    def now(self) -> AccountsNow:
        return AccountsNow(dict(self._tenants), replace(self._totals), self.gamma, self._energy_counters)

    def begin_step(self) -> None:
        if self._energy is not None:
            self._energy.begin_step()

    def end_step(self, computed: Iterable[tuple[Turn, Slice]]) -> None:
        """The step's slices, whether it ended or was interrupted: both took energy."""
        if self._energy is not None:
            self._energy.end_step((turn.id, self._alone_seconds(item)) for turn, item in computed)

    def pause(self) -> None:
        """Nothing is computed at this step border."""
        if self._energy is not None:
            self._energy.pause()

    def book(self, turn: Turn, start: int, count: int, again_tokens: int) -> None:
        """Positions [start, start + count) of the turn are computed, the first `again_tokens` of them once again."""
        work = work_of(start, count, prompt_tokens=turn.prompt_tokens, again_tokens=again_tokens)
        self._work[turn.id] = self._work.get(turn.id, Work()) + work
        self._totals.recomputed_tokens += again_tokens
        self._totals.prefill_tokens += max(0, min(start + count, turn.prompt_tokens) - start)

    def leave(self, turn: Turn) -> Spent:
        """The turn leaves this engine: nothing of it is kept here."""
        return Spent(self._work.pop(turn.id, Work()), self._close_energy(turn))

    def enter(self, turn: Turn, spent: Spent) -> None:
        """The turn comes from another engine, or back from there."""
        self._work[turn.id] = spent.work
        if self._energy is not None:
            self._energy.open(turn.id, spent.energy_joules)

    def close(self, turn: Turn, session: Session, now_ns: int) -> TurnCost:
        """What a turn that ends has cost; added to its session and its tenant."""
        work, gamma = self._work.pop(turn.id, Work()), self.gamma
        cost = TurnCost(
            pte=pte(work, gamma) if gamma is not None else None,
            wasted_pte=float(work.wasted_tokens),
            energy_joules=self._close_energy(turn),
            duration_ns=now_ns - turn.arrival_ns,
            ideal_ns=self._ideal_ns(turn),
        )
        self._totals.turns_finished += 1
        session.cost = session.cost.plus(cost)
        sums = self._tenants.get(turn.tenant_id, TenantCost())
        sums = replace(sums, pte=sums.pte + (cost.pte or 0.0), wasted_pte=sums.wasted_pte + cost.wasted_pte)
        if cost.energy_joules is not None:
            sums = replace(sums, energy_joules=(sums.energy_joules or 0.0) + cost.energy_joules)
        self._tenants[turn.tenant_id] = sums
        return cost

    def _close_energy(self, turn: Turn) -> float | None:
        if self._energy is None:
            return None
        joules = self._energy.close(turn.id)
        if not self._work:
            self._energy.pause()  # now, and not at the next step border: the engine may sleep before that
        return joules

    def _ideal_ns(self, turn: Turn) -> int | None:
        # What was dropped and computed again is part of the slowdown, not of the ideal.
        in_place = min(turn.prompt_tokens, turn.cached_tokens + turn.recomputed_tokens)
        ideal_s = self.cost.prefill_seconds(turn.prompt_tokens, in_place)
        ideal_s += max(0, turn.output_tokens - 1) * self.cost.decode_step_seconds
        return int(ideal_s * 1e9) if ideal_s > 0 and turn.output_tokens else None

    def _alone_seconds(self, item: Slice) -> float:
        """What the slice would have taken alone, by the cost model; its tokens where there is none."""
        if item.count == 1:
            return self.cost.decode_step_seconds or 1.0
        return self.cost.prefill_seconds(item.start + item.count, item.start) or float(item.count)
