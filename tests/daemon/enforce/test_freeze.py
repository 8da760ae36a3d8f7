"""Freezes and thaws, against a fake v2 tree and against real processes."""

from __future__ import annotations

from equipoise.daemon.enforce import freeze
from equipoise.daemon.observe.journal.hold import Hold, HoldCause
from equipoise.policies.actions import Freeze, OutcomeStatus, Thaw, Throttle
from equipoise.policies.model import NS_PER_S

from ..conftest import Spawn, eventually
from .conftest import CALL, LEAVES, Book, Clock, World, decided, on_process, stopped


def test_a_thaw_undoes_throttle_and_freeze_before_they_expire(world: World) -> None:
    world.do(Throttle(CALL, 1000, 0.2, world.in_s(10)))
    world.do(Freeze(CALL, world.in_s(10)))
    assert world.do(Thaw(CALL)).status is OutcomeStatus.COMPLETED
    assert not world.book.entries and not world.done(LEAVES[CALL], freeze.FREEZE)
    assert world.do(Thaw(CALL)).status is OutcomeStatus.GONE


def test_a_deed_that_fails_leaves_no_hold(world: World) -> None:
    freeze = world.tree.root / LEAVES[CALL] / "cgroup.freeze"
    freeze.unlink()
    freeze.symlink_to("/dev/full")  # refuses every write; must not be read, it never ends
    world.book.untouched = lambda hold: True
    outcome = world.do(Freeze(CALL, world.in_s(1)))
    assert outcome.status is OutcomeStatus.FAILED and "No space left" in outcome.detail
    freeze.unlink()
    freeze.write_text("0")
    world.clock.now_ns = world.in_s(2)
    world.actuator.expire(world.clock.now_ns)
    assert not world.book.entries


def test_a_budget_freeze_survives_the_thaw_of_another_freeze(world: World) -> None:
    world.do(Freeze(CALL, world.in_s(10)))
    world.holds.take(Hold(freeze.FREEZE, HoldCause.BUDGET, world.clock.now_ns, world.in_s(30), CALL, path=LEAVES[CALL]))
    world.do(Thaw(CALL))
    assert world.done(LEAVES[CALL], freeze.FREEZE), "it still stands at its budget"


def test_without_a_leaf_a_freeze_stops_exactly_its_processes_until_it_expires(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    outcome = actuator.execute(decided(Freeze(CALL, clock.now_ns + NS_PER_S), clock.now_ns))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "signal")
    assert eventually(lambda: stopped(ref))
    assert [h.process for h in book.entries.values()] == [ref]
    clock.now_ns += NS_PER_S
    assert [o.status for o in actuator.expire(clock.now_ns)] == [OutcomeStatus.EXPIRED]
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_freeze_that_cannot_be_written_down_stops_nobody(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    book.refuses = True
    outcome = actuator.execute(decided(Freeze(CALL, clock.now_ns + NS_PER_S), clock.now_ns))
    assert outcome.status is OutcomeStatus.FAILED and not stopped(ref)
