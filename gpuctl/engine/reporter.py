"""Tells whoever listens what happened.

Owns: the listeners, the outcomes told (outcomes.py), and the pace of the occupancy reports. Must not: change the books
it reads. On the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from ...policies.model import AskedToolCall, KvTier
from ..directives import Outcome
from ..outcomes import Outcomes
from ..reports import Listener, Occupancy, Report, Reported, SessionKv, TierUse, TurnEnded
from .schedule.cost_figures import CostFigures
from .schedule.ledger import Holding
from .schedule.scheduler import Scheduler
from .schedule.sequence import FinishReason, Turn, TurnFinished
from .totals import Totals

OCCUPANCY_PERIOD_NS = 200_000_000


class Reporter:
    def __init__(self, scheduler: Scheduler, totals: Totals, clock: Callable[[], int]) -> None:
        self.cost = CostFigures()
        self.occupancy_due = True
        """Something the next occupancy report should show has changed."""
        self._scheduler = scheduler
        self._totals = totals
        self._clock = clock
        self._listeners: list[Listener] = []
        self.outcomes = Outcomes()
        self._occupancy_sent_ns = 0

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self.occupancy_due = True

    def remove(self, listener: Listener) -> None:
        """Safe where it is not (or no longer) listening."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def report(self, report: Report) -> None:
        reported = Reported(self._clock(), report)
        for listener in self._listeners:
            listener(reported)

    def settle(self, outcome: Outcome) -> None:
        """Remember and report an outcome; the newest of a directive answers its repetition."""
        self.outcomes.note(outcome)
        self.occupancy_due = True
        self.report(outcome)

    def report_occupancy(self, *, at_once: bool = False) -> None:
        """Report the books if they changed, or turns run, and the last report is a period old; or `at_once`."""
        now_ns = self._clock()
        if not self._listeners or not (at_once or self.occupancy_due or self._scheduler.running):
            return
        if now_ns - self._occupancy_sent_ns < OCCUPANCY_PERIOD_NS and not at_once:
            return
        self._occupancy_sent_ns = now_ns
        self.occupancy_due = False
        self.report(self.occupancy())

    def occupancy(self) -> Occupancy:
        """The books of this moment."""
        scheduler, ledger = self._scheduler, self._scheduler.ledger
        sessions = []
        for session in scheduler.sessions.values():
            holding = ledger.holding(session.id)
            tier, held = holding.longest()
            sessions.append(
                SessionKv(
                    session_id=session.id,
                    tenant_id=session.tenant_id,
                    phase=scheduler.phase(session),
                    tier=tier.told_as,
                    held_tokens=held,
                    context_tokens=len(session.tokens),
                    host_bytes=_told(holding, KvTier.HOST) * ledger.bytes_per_token,
                    disk_bytes=_told(holding, KvTier.DISK) * ledger.bytes_per_token,
                    retain_until_ns=session.pinned_until_ns,
                    shared_tokens=ledger.shared_tokens(session.id),
                    charged_tokens=ledger.charged_tokens(session.id),
                )
            )
        return Occupancy(
            sessions=tuple(sessions),
            device_used_tokens=ledger.device_used_tokens,
            host_used_bytes=ledger.used_bytes(KvTier.HOST),
            disk_used_bytes=ledger.used_bytes(KvTier.DISK),
            running_count=len(scheduler.running),
            waiting_count=len(scheduler.waiting),
            device_capacity_tokens=ledger.device_capacity_tokens,
            host_capacity_bytes=ledger.capacity_bytes(KvTier.HOST),
            totals=self._totals.told(),
            cost=self.cost,
            tiers=tuple(
                TierUse(each.tier.value, each.used_tokens * ledger.bytes_per_token, each.capacity_bytes)
                for each in ledger.lower
            ),
        )


def _told(holding: Holding, told_as: KvTier) -> int:
    """Tokens in the tiers that the daemon takes for this one."""
    tokens = 0
    for place, held in enumerate(holding.copies):
        if held and holding.lower[place].tier.told_as is told_as:
            tokens += held
    return tokens


def turn_ended(turn: Turn, end: TurnFinished, reason: FinishReason, asked: tuple[AskedToolCall, ...] = ()) -> TurnEnded:
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
        asked=asked,
    )
