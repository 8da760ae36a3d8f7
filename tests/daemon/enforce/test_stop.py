"""Stopped at the budget: granted, waiting, or going on by itself; against real processes."""

from __future__ import annotations

import signal

from equipoise.daemon.enforce import stop
from equipoise.daemon.enforce.actuator import Actuator
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.observe.journal.hold import HoldKind
from equipoise.daemon.sandboxes import processes
from equipoise.policies.actions import Freeze, Grant, OutcomeStatus, Wait
from equipoise.policies.events import BudgetLevel, BudgetReached
from equipoise.policies.model import MIB, NS_PER_S

from ..conftest import Spawn, eventually
from .conftest import CALL, OTHER_CALL, Book, Clock, KernelBudgets, World, decided, on_process, stopped


def test_an_armed_sandbox_is_written_down_once_and_stays_so_after_a_release(world: World) -> None:
    assert world.actuator.arm("equipoise/gold/ada") and world.actuator.arm("equipoise/gold/ada")
    world.do(Freeze(CALL, world.in_s(10)))
    assert world.actuator.release_all() == 0
    assert [h.kind for h in world.book.entries.values()] == [HoldKind.ARMED]
    assert world.actuator.release_all(ending=True) == 0
    assert not world.book.entries


def test_a_grant_raises_the_budget_and_lets_it_go_on(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    assert len(book.entries) == 1
    outcome = actuator.execute(decided(Grant(CALL, 15 * MIB, 20 * MIB), clock.now_ns))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "kernel budget")
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_grant_to_a_call_that_has_ended_is_an_outcome(spawn: Spawn) -> None:
    actuator, _ = on_process(spawn(), Book(), clock := Clock())
    outcome = actuator.execute(decided(Grant(OTHER_CALL, 1, 2), clock.now_ns))
    assert outcome.status is OutcomeStatus.GONE


def test_a_wait_ends_in_a_larger_budget_if_nothing_else_is_decided(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    budgets = KernelBudgets(child.pid)
    actuator = Actuator(Holds(book, None), None, budgets, now_ns=clock)
    ref = processes.identify(child.pid)
    assert ref is not None
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    assert actuator.execute(decided(Wait(CALL, MIB, clock.now_ns + 5 * NS_PER_S), clock.now_ns)).status is (
        OutcomeStatus.COMPLETED
    )
    clock.now_ns += 5 * NS_PER_S
    assert actuator.expire(clock.now_ns) == (), "the policy's verdict at this moment comes first"
    clock.now_ns += stop.WAIT_GRACE_NS
    assert [o.status for o in actuator.expire(clock.now_ns)] == [OutcomeStatus.EXPIRED]
    assert budgets.hard_bytes == 15 * MIB, "a runaway still meets a budget"
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_stop_that_nobody_answers_ends_by_itself(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    clock.now_ns += stop.UNANSWERED_NS
    actuator.expire(clock.now_ns)
    assert eventually(lambda: not stopped(ref)) and not book.entries
