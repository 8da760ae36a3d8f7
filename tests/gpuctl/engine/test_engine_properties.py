"""What must never break, whatever arrives when: no KV leaked, no slot used twice, no wrong token, no starvation."""

from __future__ import annotations

from typing import Any

from equipoise.gpuctl.engine import directives as ask
from equipoise.gpuctl.engine.directives import PreemptMode
from equipoise.gpuctl.engine.sequence import FinishReason, SessionId, Tier
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
            host_tokens=100,
            runner=runner,
            step_tokens=32,
            mixed_prefill_tokens=8,
            share_prefix_tokens=3,
        )
        self.under_way: dict[str, tuple[str, int, Turn]] = {}
        self.text: dict[str, str] = {}
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

    @rule(session=st.sampled_from(SESSIONS), kind=st.integers(0, 8), number=st.integers(0, 60))
    def direct(self, session: str, kind: int, number: int) -> None:
        session_id = SessionId(session)
        directives: list[Any] = [
            lambda: ask.SwapOut(**self.common(), session_id=session_id, tier=Tier.HOST),
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
            self.text[session] = prompt + turn.text

    @invariant()
    def the_books_are_whole(self) -> None:
        self.driven.engine._ledger.check_integrity()
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


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
