"""What must never break, whatever arrives when: no KV leaked, no slot used twice, no wrong token, no starvation."""

from __future__ import annotations

from typing import Any

from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.directives import PreemptMode
from equipoise.gpuctl.engine.schedule.cost_figures import CostFigures
from equipoise.gpuctl.engine.schedule.sequence import FinishReason, SessionId, Slo, Tier, TurnAccepted
from equipoise.gpuctl.engine.tiers.store import HostTier
from equipoise.gpuctl.engine.tiers.table import OpenTier
from equipoise.policies.model import KvTier
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven, Turn
from equipoise.tests.gpuctl.engine.fakes import FakeRunner
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SESSIONS = ("a", "b", "c", "d", "e")
TENANT_OF = {"a": "red", "b": "red", "c": "blue", "d": "green", "e": "green"}


class EngineMachine(RuleBasedStateMachine):
    """Agents that come and go, and a daemon that asks for anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        # Cells are not shared in the fake: it has room for what the real one would share.
        runner = FakeRunner(physical_tokens=400, slot_count=4, ends=True)
        self.driven = Driven(
            kv_tokens=120,
            host_tokens=60,
            below=[OpenTier(Tier(name, KvTier.DISK), 16 * 50, HostTier()) for name in ("cellar", "attic")],
            runner=runner,
            step_tokens=32,
            mixed_prefill_tokens=8,
            share_prefix_tokens=3,
        )
        self.driven.engine.cost = CostFigures(prefill_seconds_per_token=0.001, decode_step_seconds=0.01)
        self.under_way: dict[str, tuple[str, int, Turn]] = {}
        self.text: dict[str, str] = {}
        self.unnamed: list[tuple[str, str, int, Turn]] = []
        """Turns of clients that name no session: tenant, prompt, most tokens, what they see."""
        self.told: list[tuple[str, str]] = []
        """Tenant and text of the conversations such clients could go on with."""
        self.owner: dict[str, str] = {}
        """Tenant of each session that such clients were given."""
        self.numbers = 0

    def name(self) -> str:
        self.numbers += 1
        return f"directive-{self.numbers}"

    def common(self, life_s: int = 5) -> dict[str, Any]:
        return {"directive_id": self.name(), "deadline_ns": self.driven.now_ns + life_s * SECOND}

    @rule(session=st.sampled_from(SESSIONS), more=st.text("xy", min_size=1, max_size=20), tokens=st.integers(1, 20))
    def ask_turn(self, session: str, more: str, tokens: int) -> None:
        if session in self.under_way:
            return
        prompt = self.text.get(session, "") + more
        if len(prompt) > 90:
            prompt = more
        turn = self.driven.turn(session, prompt, tokens, TENANT_OF[session])
        self.under_way[session] = (prompt, tokens, turn)

    @rule(
        tenant=st.sampled_from(["red", "blue"]),
        before=st.integers(0, 8),
        more=st.text("xy", min_size=1, max_size=20),
        tokens=st.integers(1, 20),
    )
    def ask_without_a_name(self, tenant: str, before: int, more: str, tokens: int) -> None:
        texts = [text for owner, text in self.told if owner == tenant]
        prompt = (texts[-1 - before] if before < len(texts) else "") + more
        if len(prompt) > 90:
            prompt = more
        self.numbers += 1
        turn = self.driven.turn(f"unnamed-{self.numbers}", prompt, tokens, tenant, anonymous=True)
        self.unnamed.append((tenant, prompt, tokens, turn))

    @rule(
        tenant=st.sampled_from(["red", "green"]),
        prefix=st.text("xy", min_size=4, max_size=60),
        rests=st.lists(st.text("xy", min_size=1, max_size=6), min_size=2, max_size=5),
        slo=st.sampled_from([Slo(), Slo(ttft_ns=SECOND), Slo(tpot_ns=SECOND // 50), Slo(deadline_ns=SECOND)]),
    )
    def ask_as_a_group(self, tenant: str, prefix: str, rests: list[str], slo: Slo) -> None:
        for rest in rests:
            self.numbers += 1
            turn = self.driven.turn(
                f"member-{self.numbers}", prefix + rest, 3, tenant, slo=slo, ephemeral=self.numbers % 2 == 0
            )
            self.under_way[f"member-{self.numbers}"] = (prefix + rest, 3, turn)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        self.driven.steps(count)
        self.capacity_is_kept()
        self.collect()

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.driven.advance(seconds)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.under_way)))
        turn_id = self.under_way[session][2].id
        assert turn_id is not None
        self.driven.engine.cancel(turn_id)
        self.driven.steps(1)
        self.collect()

    @rule(session=st.sampled_from(SESSIONS), kind=st.integers(0, 9), number=st.integers(0, 60))
    def direct(self, session: str, kind: int, number: int) -> None:
        session_id = SessionId(session)
        directives: list[Any] = [
            lambda: ask.SwapOut(**self.common(), session_id=session_id, tier=KvTier.HOST),
            lambda: ask.SwapOut(**self.common(), session_id=session_id, tier=KvTier.DISK),
            lambda: ask.SwapIn(**self.common(), session_id=session_id),
            lambda: ask.Drop(**self.common(), session_id=session_id, from_token=number),
            lambda: ask.Hold(**self.common(), session_id=session_id, ttl_ns=number * SECOND),
            lambda: ask.Release(**self.common(), session_id=session_id),
            lambda: ask.Retain(**self.common(), session_id=session_id, ttl_ns=number * SECOND),
            lambda: ask.Preempt(**self.common(), session_id=session_id, mode=list(PreemptMode)[number % 2]),
            lambda: ask.SetCapacity(**self.common(), device_tokens=100 + number),
            lambda: ask.SetHostTierCapacity(**self.common(), host_bytes=number * 32),
        ]
        self.driven.engine.direct(directives[kind]())

    @rule()
    def lose_daemon(self) -> None:
        self.driven.engine.release_holds()

    def collect(self) -> None:
        for session, (prompt, tokens, turn) in list(self.under_way.items()):
            if turn.refusal is not None:
                raise AssertionError(turn.refusal.error)
            if turn.end is None:
                continue
            del self.under_way[session]
            if turn.end.reason is FinishReason.CANCELLED:
                self.text.pop(session, None)
                continue
            assert turn.text == self.driven.runner.expected_output(prompt, tokens), session
            if session in SESSIONS:
                self.text[session] = prompt + turn.text
        for entry in list(self.unnamed):
            tenant, prompt, tokens, turn = entry
            if turn.refusal is not None:
                raise AssertionError(turn.refusal.error)
            if turn.end is None:
                continue
            self.unnamed.remove(entry)
            assert turn.text == self.driven.runner.expected_output(prompt, tokens)
            (accepted,) = [event for event in turn.events if isinstance(event, TurnAccepted)]
            assert self.owner.setdefault(accepted.session_id, tenant) == tenant, "another tenant's conversation"
            self.told.append((tenant, prompt + turn.text))

    @invariant()
    def the_books_are_whole(self) -> None:
        scheduler = self.driven.engine._scheduler
        scheduler.ledger.check_integrity()
        scheduler.groups.check_integrity()
        for session_id in self.driven.engine._by_text._filed:
            session = scheduler.sessions.get(SessionId(session_id))
            assert session is None or (session.anonymous and session.turn is None), session_id
        assert self.driven.engine.totals.swap_failures == 0

    def capacity_is_kept(self) -> None:
        """After a step, unless one turn runs alone (it always may) or a lowered capacity meets a pinned session."""
        scheduler = self.driven.engine._scheduler
        pinned = any(session.pinned_until_ns is not None for session in scheduler.sessions.values())
        if len(scheduler.running) > 1 and not pinned:
            assert scheduler.ledger.device_free_tokens >= 0

    def teardown(self) -> None:
        """Nobody is starved: once holds have run out, every turn ends."""
        self.driven.advance(3600)
        self.driven.settle()
        self.collect()
        assert not self.under_way, "turns that never end"
        assert not self.unnamed, "turns that never end"
        assert not self.driven.engine._scheduler.groups._members


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
