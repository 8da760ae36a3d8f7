"""Tells whoever listens what happened, and remembers how directives ended.

Owns: the listeners, the outcomes (so that a repeated directive is answered, not applied again), and the pace of the
occupancy reports. Must not: change the books it reads. On the engine's thread only.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import replace

from ..directives import Outcome
from ..reports import CostFigures, Occupancy, Report, Reported, SessionKv, Totals
from .schedule.scheduler import Scheduler

OCCUPANCY_PERIOD_NS = 200_000_000
_REMEMBERED_OUTCOMES = 4096

Listener = Callable[[Reported], None]


class Reporter:
    def __init__(self, scheduler: Scheduler, totals: Totals, clock: Callable[[], int]) -> None:
        self.cost = CostFigures()
        self.occupancy_due = True
        """Something the next occupancy report should show has changed."""
        self._scheduler = scheduler
        self._totals = totals
        self._clock = clock
        self._listeners: list[Listener] = []
        self._outcomes: collections.OrderedDict[str, Outcome] = collections.OrderedDict()
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
        self._outcomes[outcome.directive_id] = outcome
        if len(self._outcomes) > _REMEMBERED_OUTCOMES:
            self._outcomes.popitem(last=False)
        self.occupancy_due = True
        self.report(outcome)

    def outcome_of(self, directive_id: str) -> Outcome | None:
        """What became of a directive seen before; None for a new one."""
        return self._outcomes.get(directive_id)

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
                    tier=tier,
                    held_tokens=held,
                    context_tokens=len(session.tokens),
                    host_bytes=holding.host_tokens * ledger.bytes_per_token,
                    disk_bytes=holding.disk_tokens * ledger.bytes_per_token,
                    retain_until_ns=session.pinned_until_ns,
                    shared_tokens=ledger.shared_tokens(session.id),
                    charged_tokens=ledger.charged_tokens(session.id),
                )
            )
        return Occupancy(
            sessions=tuple(sessions),
            device_used_tokens=ledger.device_used_tokens,
            host_used_bytes=ledger.host_used_bytes,
            disk_used_bytes=ledger.disk_used_bytes,
            running_count=len(scheduler.running),
            waiting_count=len(scheduler.waiting),
            device_capacity_tokens=ledger.device_capacity_tokens,
            host_capacity_bytes=ledger.host_capacity_bytes,
            totals=replace(self._totals),
            cost=self.cost,
        )
