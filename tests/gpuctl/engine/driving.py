"""Drives a real Engine step by step, without its thread: time stands still unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.directives import Outcome
from equipoise.gpuctl.energy import EnergyMeter
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.ledger import Holding
from equipoise.gpuctl.engine.schedule.scheduler import SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import (
    FinishReason,
    SessionId,
    TenantId,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnId,
    TurnRefused,
    TurnRequest,
)
from equipoise.gpuctl.engine.tiers.store import HostTier
from equipoise.gpuctl.engine.tiers.table import DISK, HOST, OpenTier, in_memory
from equipoise.gpuctl.reports import Reported, SessionMoved
from equipoise.policies.accounting import Gamma
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.fakes import FakeModel, FakeRunner

SECOND = 10**9


@dataclass
class Turn:
    """What one turn's client has seen."""

    id: TurnId | None = None
    events: list[TurnEvent] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def end(self) -> TurnFinished | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TurnFinished) else None

    @property
    def refusal(self) -> TurnRefused | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TurnRefused) else None


class Driven:
    """An engine over a fake runner, with a clock of its own. `below`: tiers under host and disk."""

    def __init__(
        self,
        *,
        kv_tokens: int = 1000,
        host_tokens: int = 1000,
        disk: Any = None,
        disk_tokens: int = 0,
        below: Sequence[OpenTier] = (),
        runner: FakeRunner | None = None,
        max_queued_turns: int = 256,
        max_sessions: int = 4096,
        keep_anonymous: bool = True,
        gamma: Gamma | None = None,
        meter: EnergyMeter | None = None,
        **scheduler: Any,
    ) -> None:
        self.runner = runner or FakeRunner(physical_tokens=max(1024, kv_tokens))
        self.now_ns = 1000 * SECOND
        config = EngineConfig(
            kv_tokens=kv_tokens,
            max_queued_turns=max_queued_turns,
            max_sessions=max_sessions,
            keep_anonymous=keep_anonymous,
            scheduler=SchedulerConfig(**scheduler),
        )
        tiers = [*in_memory(host_tokens * self.runner.bytes_per_token)]
        if disk is not None:
            tiers.append(OpenTier(DISK, disk_tokens * self.runner.bytes_per_token, disk))
        tiers += below
        self.engine = Engine(
            cast(Any, FakeModel()), self.runner, config, tiers, clock=lambda: self.now_ns, gamma=gamma, meter=meter
        )
        self.reports: list[Reported] = []
        self.engine.listen(self.reports.append)

    def turn(self, session: str, prompt: str, tokens: int = 5, tenant: str = "t", **request: Any) -> Turn:
        turn = Turn()
        turn.id = self.engine.submit(
            TurnRequest(SessionId(session), TenantId(tenant), prompt, max_tokens=tokens, **request), turn.events.append
        )
        return turn

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.cycle()
            self.check()

    def settle(self, limit: int = 2000) -> None:
        """Step until nothing is left to do."""
        for _ in range(limit):
            done = self.engine.cycle()
            self.check()
            if not done:
                return
        raise AssertionError(f"still busy after {limit} steps")

    def complete(self, session: str, prompt: str, tokens: int = 5, **request: Any) -> Turn:
        """A turn, to its end."""
        turn = self.turn(session, prompt, tokens, **request)
        self.settle()
        assert turn.end is not None, turn.events
        assert turn.end.reason in (FinishReason.LENGTH, FinishReason.STOP), turn.end
        return turn

    def check(self) -> None:
        """The books are whole and say what the runner and the swapper really hold."""
        ledger = self.engine._ledger
        ledger.check_integrity()
        self.engine._scheduler.groups.check_integrity()
        slots: dict[int, int] = {}
        for session_id in ledger:
            holding = ledger.holding(session_id)
            if holding.slot is not None:
                slots[holding.slot] = holding.device_tokens
                tokens = self.engine._scheduler.sessions[session_id].tokens
                held = self.runner.slots.get(holding.slot, [])
                # What an action of this very step border changes in the books the next plan carries out.
                if not self.engine._scheduler.placement.moves:
                    assert held == tokens[: holding.device_tokens], session_id
            if not self.engine._scheduler.placement.moves:
                for tier, store in self.engine._swapper.stores.items():
                    if isinstance(store, HostTier):
                        assert store.tokens(session_id) >= holding.copy_tokens(tier), f"{session_id} in {tier.value}"
        if not self.engine._scheduler.placement.moves:
            for slot, held in self.runner.slots.items():
                assert len(held) == slots.get(slot, 0), f"slot {slot} holds {len(held)} tokens nobody owns"

    def direct(self, directive: Any) -> Outcome:
        """Apply a directive at a step border; its first outcome."""
        before = len(self.reports)
        self.engine.direct(directive)
        self.engine.cycle()
        return next(
            r.report
            for r in self.reports[before:]
            if isinstance(r.report, Outcome) and r.report.directive_id == directive.directive_id
        )

    def outcomes(self, directive_id: str) -> list[Outcome]:
        return [
            r.report for r in self.reports if isinstance(r.report, Outcome) and r.report.directive_id == directive_id
        ]

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND)


def host_tokens(driven: Driven, session: str) -> int:
    """Tokens of the session that are really kept in host RAM."""
    store = driven.engine._swapper.stores[HOST]
    assert isinstance(store, HostTier)
    return store.tokens(SessionId(session))


def swap_out(driven: Driven, session: str, tier: KvTier = KvTier.HOST, name: str = "out") -> ask.SwapOut:
    return ask.SwapOut(directive_id=name, deadline_ns=driven.now_ns + SECOND, session_id=SessionId(session), tier=tier)


def holding(driven: Driven, session: str) -> Holding:
    return driven.engine._ledger.holding(SessionId(session))


def moved(driven: Driven) -> list[SessionMoved]:
    return [r.report for r in driven.reports if isinstance(r.report, SessionMoved)]
