"""A dry run: what budgets would have stopped, granted and ended is decided and told, and nothing is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from equipoise.daemon.loop import Loop
from equipoise.policies.actions import Decision, Grant, Kill, Outcome, OutcomeStatus, Wait
from equipoise.policies.events import (
    DecisionMade,
    Event,
    OutcomeObserved,
    PolicyApplied,
    ProcessesGone,
    SandboxRegistered,
)
from equipoise.policies.model import MIB, NS_PER_S, ToolCallId, ToolCallPhase
from equipoise.policies.policy import Budget, CallClass, Mode, Policy
from equipoise.policies.state import State
from equipoise.tests.policies.facts import ended, host_sampled, ns, policy, sandbox, started, stepped
from hypothesis import given, settings
from hypothesis import strategies as st


class Bench:
    """A loop in a dry run over a real State; `told` is what the journal would hold."""

    def __init__(self, of: Policy) -> None:
        self.now_ns = ns(1.0)
        self.told: list[Decision] = []
        self.came: list[Outcome] = []
        self.acted: list[Decision] = []
        self.state = State(of)
        self.loop = Loop(self.state, self.act, (self.sink,), lambda: self.now_ns)
        self.go(SandboxRegistered(0, sandbox()), host_sampled())

    def act(self, decision: Decision) -> Outcome | None:
        self.acted.append(decision)
        return Outcome(decision.id, OutcomeStatus.COMPLETED, self.now_ns, "test")

    def sink(self, event: Event, state: State) -> None:
        if isinstance(event, DecisionMade):
            self.told.append(event.decision)
        elif isinstance(event, OutcomeObserved):
            self.came.append(event.outcome)

    def go(self, *events: Event, at_s: float | None = None) -> None:
        if at_s is not None:
            self.now_ns = ns(at_s)
        for event in events:
            self.loop.emit(event)
        self.loop.turn()

    def would_be(self, id: int = 1) -> str:
        return self.loop.would_be(self.state.tool_calls[ToolCallId(id)])

    def kinds(self) -> list[str]:
        return [type(decision.action).__name__ for decision in self.told]


def dry(**memory: Any) -> Policy:
    return replace(policy(**memory), mode=Mode.DRY_RUN)


def test_a_call_that_outgrows_its_budget_would_be_granted_step_by_step_and_ended_at_the_largest() -> None:
    bench = Bench(dry())  # 512 MiB, steps of 256, at most 1024, in a pool of 1024
    bench.go(started(1.0), at_s=1.0)
    for at_s, mib in ((1.1, 300), (1.2, 600), (1.3, 900), (1.4, 1100)):
        bench.go(stepped(at_s, mib), at_s=at_s)
    granted = [d.action.hard_bytes // MIB for d in bench.told if isinstance(d.action, Grant)]
    assert granted == [768, 1024]
    assert isinstance(bench.told[-1].action, Kill)
    assert bench.told[-1].evidence.startswith("reached 1024 MiB at the largest budget of 1024 MiB")
    assert bench.would_be() == "ended"
    call = bench.state.tool_calls[ToolCallId(1)]
    assert (call.phase, call.used_bytes, call.hard_bytes) == (ToolCallPhase.RUNNING, 1100 * MIB, 0), "in truth it runs"
    assert not bench.acted
    assert {outcome.status for outcome in bench.came} == {OutcomeStatus.DRY_RUN}
    assert len(bench.came) == len(bench.told)


def test_after_its_would_be_end_nothing_is_said_of_a_call_and_its_memory_is_free() -> None:
    bench = Bench(dry())
    bench.go(started(1.0), stepped(1.1, 1100), at_s=1.1)
    bench.go(at_s=1.2)
    bench.go(at_s=1.3)
    said = len(bench.told)
    bench.go(started(2.0, id=2), stepped(2.1, 900, id=2), stepped(2.1, 1200), at_s=2.1)
    assert {d.action.tool_call for d in bench.told[said:] if isinstance(d.action, Grant)} == {2}
    bench.go(ended(3.0), ProcessesGone(ns(3.0), ToolCallId(1)), at_s=3.0)
    bench.state.check_integrity()


def test_a_call_waits_for_memory_in_the_dry_run_only_and_its_memory_counts_when_it_goes_on() -> None:
    bench = Bench(dry(pool_mib=700, wait_ns=5 * NS_PER_S))
    bench.go(started(1.0), started(1.0, id=2), at_s=1.0)
    bench.go(stepped(1.1, 400, id=1), stepped(1.1, 600, id=2), at_s=1.1)
    (waits,) = [d.action.tool_call for d in bench.told if isinstance(d.action, Wait)]
    assert bench.would_be(waits) == "stopped"
    assert bench.state.tool_calls[waits].phase is ToolCallPhase.RUNNING
    other = 3 - waits
    bench.go(ended(2.0, id=other), ProcessesGone(ns(2.0), ToolCallId(other)), at_s=2.0)
    assert bench.kinds()[-1] == "Grant" and bench.told[-1].subject == "gold/ada pytest"
    assert not bench.would_be(waits)


def test_what_would_be_slowed_down_is_let_go_after_its_time_or_when_pressure_is_over() -> None:
    bench = Bench(dry(budget=Budget(1000 * MIB, 1000 * MIB)))
    bench.go(started(1.0), stepped(1.0, 950), at_s=1.0)
    bench.go(at_s=3.0)
    assert bench.kinds() == ["Throttle"] and bench.would_be() == "throttled"
    bench.go(at_s=8.0)
    assert bench.kinds() == ["Throttle", "Throttle"], "its time was over, and the pressure was not"
    bench.go(stepped(8.5, 100), at_s=8.5)
    assert bench.kinds()[-1] == "Thaw" and not bench.would_be()


def test_budgets_of_classes_hold_in_a_dry_run_too() -> None:
    tests = CallClass("tests", tool="pytest", budget=Budget(100 * MIB, 200 * MIB))
    bench = Bench(replace(dry(), classes=(tests,)))
    bench.go(started(1.0), stepped(1.1, 250), at_s=1.1)
    assert bench.told[0].evidence.startswith("stopped at 200 MiB")


def test_exempt_calls_have_no_budget() -> None:
    bench = Bench(dry())
    bench.go(started(1.0, exempt=True), stepped(1.1, 1500), at_s=1.1)
    assert not bench.told


def test_observing_decides_nothing() -> None:
    bench = Bench(replace(policy(), mode=Mode.OBSERVE))
    bench.go(started(1.0), stepped(1.1, 1500), at_s=1.1)
    bench.go(at_s=9.0)
    assert not bench.told and not bench.acted and not bench.would_be()


def test_a_policy_that_enforces_ends_the_dry_run_and_one_that_does_not_begins_it() -> None:
    bench = Bench(policy())
    bench.go(started(1.0), stepped(1.1, 600), at_s=1.1)
    assert not bench.told, "nobody told of a stop: the kernel has its budget"
    bench.go(PolicyApplied(ns(2.0), dry()), at_s=2.0)
    bench.go(stepped(2.1, 620), at_s=2.1)
    assert bench.kinds() == ["Grant"] and not bench.acted
    bench.go(PolicyApplied(ns(3.0), policy()), at_s=3.0)
    bench.go(stepped(3.1, 640), at_s=3.1)
    assert bench.kinds() == ["Grant"] and not bench.would_be()


@st.composite
def happenings(draw: st.DrawFn) -> list[tuple[float, Event | str]]:
    """What up to four calls do in a minute, with changes of the policy in between, in the order of time."""
    found: list[tuple[float, Event | str]] = []
    for id in range(1, draw(st.integers(1, 4)) + 1):
        begin_s = draw(st.floats(1, 20))
        found.append((begin_s, started(begin_s, id=id, exempt=draw(st.booleans()))))
        for after_s in sorted(draw(st.lists(st.floats(0.1, 30), max_size=8))):
            found.append((begin_s + after_s, stepped(begin_s + after_s, draw(st.integers(0, 2000)), id=id)))
        if draw(st.booleans()):
            found += [(52.0, ended(52.0, id=id)), (53.0, ProcessesGone(ns(53.0), ToolCallId(id)))]
    found += [
        (at_s, draw(st.sampled_from(("enforce", "observe", "dry-run"))))
        for at_s in draw(st.lists(st.floats(5, 50), max_size=2))
    ]
    return sorted(found, key=lambda each: each[0])


@settings(max_examples=150, deadline=None)
@given(happenings(), st.integers(1, 10))
def test_whatever_happens_a_dry_run_does_nothing_and_its_books_hold(
    story: list[tuple[float, Event | str]], wait_s: int
) -> None:
    bench = Bench(dry(wait_ns=wait_s * NS_PER_S))
    for at_s, what in story:
        mode = bench.state.policy.mode
        acted = len(bench.acted)
        if isinstance(what, str):
            bench.go(PolicyApplied(ns(at_s), replace(bench.state.policy, mode=Mode(what))), at_s=at_s)
            continue
        bench.go(what, at_s=at_s)
        assert mode is Mode.ENFORCE or len(bench.acted) == acted
        bench.state.check_integrity()
        if rehearsal := bench.loop._rehearsal:
            rehearsal.state.check_integrity()
            for call in rehearsal.state.tool_calls.values():
                assert call.stopped_ns is None or not call.exempt
        if not bench.acted:
            assert all(c.phase in (ToolCallPhase.RUNNING, ToolCallPhase.ENDED) for c in bench.state.tool_calls.values())
