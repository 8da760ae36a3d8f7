"""What every action has in common: outcomes, expiry and the journal; and whatever the order they come in."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from equipoise.daemon.enforce import freeze, throttle
from equipoise.daemon.enforce.rung import LONGEST_HOLD_NS
from equipoise.policies.actions import Freeze, Grant, Kill, OutcomeStatus, SwapIn, Thaw, Throttle, Wait
from equipoise.policies.model import EngineId, SessionId, ToolCallId
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import CALL, LEAVES, OTHER_CALL, World, decided


def test_a_hold_is_clipped_to_the_longest_that_is_allowed(world: World) -> None:
    outcome = world.do(Freeze(CALL, world.in_s(3600)))
    assert outcome.status is OutcomeStatus.CLIPPED
    (entry,) = world.book.entries.values()
    assert entry.expires_ns == world.clock.now_ns + LONGEST_HOLD_NS


def test_an_action_that_has_expired_already_is_not_begun(world: World) -> None:
    assert world.do(Freeze(CALL, world.clock.now_ns)).status is OutcomeStatus.EXPIRED
    assert not world.book.before_each_deed and not world.done(LEAVES[CALL], freeze.FREEZE)


def test_what_cannot_be_written_down_is_not_done(world: World) -> None:
    world.book.refuses = True
    for action in (Freeze(CALL, world.in_s(1)), Throttle(CALL, 1000, 0.2, world.in_s(1))):
        outcome = world.do(action)
        assert (outcome.status, outcome.tier) == (OutcomeStatus.FAILED, "journal")
    assert not world.done(LEAVES[CALL], freeze.FREEZE) and not world.done(LEAVES[CALL], throttle.MEMORY_HIGH)
    assert world.actuator.failed_count == 2
    assert not world.actuator.arm("equipoise/gold/ada")


def test_actions_on_a_vanished_cgroup_say_gone_and_hold_nothing(world: World) -> None:
    world.actuator.bind(OTHER_CALL, leaf="equipoise/gold/ada/tools/vanished")
    for action in (
        Freeze(OTHER_CALL, world.in_s(1)),
        Throttle(OTHER_CALL, 1, 0.2, world.in_s(1)),
        Kill(OTHER_CALL, ""),
    ):
        assert world.do(action).status is OutcomeStatus.GONE
    assert not world.book.entries


def test_the_latency_counts_from_what_triggered_the_decision(world: World) -> None:
    outcome = world.actuator.execute(decided(Thaw(CALL), world.clock.now_ns - 5, trigger_ns=world.clock.now_ns - 900))
    assert outcome.latency_ns == 900


def test_engine_actions_are_a_mistake_here(world: World) -> None:
    with pytest.raises(TypeError, match="SwapIn is for an engine"):
        world.actuator.execute(decided(SwapIn(EngineId("e"), SessionId("s"), 1), 1))


CALLS = st.sampled_from(sorted(LEAVES))
SECONDS = st.floats(0.01, 300)


@st.composite
def deeds(draw: st.DrawFn) -> tuple[str, ToolCallId, float]:
    kind = draw(st.sampled_from(["throttle", "freeze", "thaw", "kill", "wait", "grant", "pass", "refuse", "accept"]))
    return kind, draw(CALLS), draw(SECONDS)


@settings(max_examples=60, deadline=None)
@given(st.lists(deeds(), max_size=25))
def test_nothing_is_ever_held_back_without_a_journal_entry_and_an_expiry(  # noqa: PLR0912 - one arm per deed
    sequence: list[tuple[str, ToolCallId, float]],
) -> None:
    with TemporaryDirectory() as root:
        world = World(Path(root))
        for kind, call, seconds in sequence:
            match kind:
                case "throttle":
                    world.do(Throttle(call, 4096, 0.1, world.in_s(seconds)))
                case "freeze":
                    world.do(Freeze(call, world.in_s(seconds)))
                case "thaw":
                    world.do(Thaw(call))
                case "kill":
                    world.do(Kill(call, "why"))
                case "wait":
                    world.do(Wait(call, 1, world.in_s(seconds)))
                case "grant":
                    world.do(Grant(call, 1, 2))
                case "pass":
                    world.clock.now_ns = world.in_s(seconds)
                    world.actuator.expire(world.clock.now_ns)
                case "refuse" | "accept":
                    world.book.refuses = kind == "refuse"
            assert {h.id for h in world.holds.all()} == set(world.book.entries)
            for leaf in LEAVES.values():
                for held in (freeze.FREEZE, throttle.MEMORY_HIGH, throttle.CPU_QUOTA):
                    if world.done(leaf, held):
                        entries = [h for h in world.book.entries.values() if h.path == leaf and h.kind == held]
                        assert entries, f"{held} on {leaf} without an entry"
                        assert all(
                            h.expires_ns is not None and h.expires_ns <= world.clock.now_ns + LONGEST_HOLD_NS
                            for h in entries
                        )
        world.clock.now_ns += LONGEST_HOLD_NS
        world.actuator.expire(world.clock.now_ns)
        assert not world.book.entries
        for leaf in LEAVES.values():
            assert not any(world.done(leaf, k) for k in (freeze.FREEZE, throttle.MEMORY_HIGH, throttle.CPU_QUOTA))
