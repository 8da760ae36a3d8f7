"""Throttles, against a fake v2 tree."""

from __future__ import annotations

from equipoise.policies.actions import OutcomeStatus, Throttle
from equipoise.policies.model import ToolCallId

from .conftest import CALL, LEAVES, World


def test_a_throttle_lowers_memory_high_and_its_expiry_restores_it(world: World) -> None:
    # As many digits as the throttle's: a plain file keeps the tail of a longer text, a kernel file does not.
    (world.tree.root / LEAVES[CALL] / "memory.high").write_text("9999999\n")
    world.book.untouched = lambda hold: world.tree.read(f"{LEAVES[CALL]}/memory.high") == "9999999"
    outcome = world.do(Throttle(CALL, 1234567, 0.2, world.in_s(10)))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "cgroup-v2 memory.high")
    assert world.tree.read(f"{LEAVES[CALL]}/memory.high") == "1234567"
    (entry,) = world.book.entries.values()
    assert entry.restore == "9999999" and entry.expires_ns == world.in_s(10)
    world.clock.now_ns = world.in_s(10)
    (expired,) = world.actuator.expire(world.clock.now_ns)
    assert expired.status is OutcomeStatus.EXPIRED and expired.decision == outcome.decision
    assert world.tree.read(f"{LEAVES[CALL]}/memory.high") == "9999999"
    assert not world.book.entries


def test_throttling_twice_extends_and_still_restores_the_first_limit(world: World) -> None:
    world.do(Throttle(CALL, 2000, 0.2, world.in_s(10)))
    world.clock.now_ns = world.in_s(5)
    world.do(Throttle(CALL, 1000, 0.2, world.in_s(10)))
    (entry,) = world.book.entries.values()
    assert entry.restore == "max" and entry.expires_ns == world.in_s(10)
    world.clock.now_ns = world.in_s(6)
    assert world.actuator.expire(world.clock.now_ns) == ()


def test_a_host_without_memory_high_is_throttled_by_cpu_quota(world: World) -> None:
    (world.tree.root / LEAVES[CALL] / "memory.high").unlink()
    outcome = world.do(Throttle(CALL, 1000, 0.25, world.in_s(10)))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "cgroup-v2 cpu quota")
    assert world.tree.read(f"{LEAVES[CALL]}/cpu.max") == "25000 100000"


def test_a_call_without_a_cgroup_of_its_own_is_not_throttled_with_its_agent(world: World) -> None:
    outcome = world.do(Throttle(ToolCallId(99), 1000, 0.2, world.in_s(1)))
    assert outcome.status is OutcomeStatus.REJECTED and "no cgroup of its own" in outcome.detail
