"""The world: the same run for the same seed, books that add up, nobody forgotten, under every policy by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.model import MIB, CostModel
from equipoise.policies.world.machine import MACHINES, Machine
from equipoise.policies.world.names import WHAT_THEY_ARE, plan
from equipoise.policies.world.script import Script, Tool, Turn
from equipoise.policies.world.tools import Keeping
from equipoise.policies.world.traces import random_scripts, room_for
from equipoise.policies.world.world import Room, World
from hypothesis import given, settings
from hypothesis import strategies as st

PLAIN = Machine("plain", 1000, CostModel(1e-3, 0.0, 0.1, 0.0, 1e6, 1e5))
"""A token: 1 ms to prefill, 0.1 s to decode, 1 ms over the link, 10 ms to or from the disk."""
PARTS = ("", "+append", "+behind", "+near", "+meet", "+door", "+prefetch", "+follow", "+fair", "+near+door+follow+meet")
TENANTS = ("gold", "silver")


def alone(name: str, *turns: Turn, tenant: str = "default") -> Script:
    return Script(tenant, name, turns)


def play(world: World, at_most_s: float = 100_000.0) -> World:
    """To the end, the books checked at every step."""
    while not world.done:
        assert world.now_s < at_most_s, world.unfinished()
        world.step(at_most_s)
        world.engine.tiers.check_integrity(world.engine.seats)
    return world


def tight(
    seed: int, agents: int, name: str, machine: Machine = MACHINES["h100-8b"], disk_bytes: int = 1 << 40
) -> World:
    scripts = random_scripts(seed, agents, TENANTS)
    return World(scripts, machine, room_for(scripts, machine, 0.25, 0.5, disk_bytes), plan(name))


def test_a_turn_alone_takes_its_prefill_and_a_step_a_token() -> None:
    world = play(World([alone("ada", Turn(100, 5))], PLAIN, Room(1000, 1 << 30), plan("drop")))
    assert world.now_s == pytest.approx(0.002 + 0.1 + 0.5)


def test_what_is_still_held_is_not_computed_again_and_what_was_lost_is() -> None:
    kept = [Turn(100, 5, pause_s=10.0), Turn(120, 5)]
    other = [Turn(1, 1, pause_s=2.0), Turn(890, 5)]
    roomy = play(World([alone("ada", *kept), alone("bo", *other)], PLAIN, Room(2000, 1 << 30), plan("drop")))
    assert roomy.tally.recomputed_tokens == 0
    assert roomy.tally.work.prefill_tokens == 120 - 5 + 890 - 1
    crowded = play(World([alone("ada", *kept), alone("bo", *other)], PLAIN, Room(900, 1 << 30), plan("drop")))
    assert crowded.tally.recomputed_tokens == 105


def test_a_swap_takes_its_time_on_the_link_and_the_disk_its_own() -> None:
    scripts = [
        alone("ada", Turn(100, 5, pause_s=10.0), Turn(120, 5)),
        alone("bo", Turn(1, 1, pause_s=2.0), Turn(890, 5)),
    ]
    by_link = play(World(scripts, PLAIN, Room(900, 1 << 30), plan("swap")))
    by_disk = play(World(scripts, PLAIN, Room(900, 0, 1 << 30), plan("swap")))
    assert by_link.tally.recomputed_tokens == by_disk.tally.recomputed_tokens == 0
    assert by_link.tally.disk_bytes == 0 and by_disk.tally.disk_bytes == 2 * 105 * 1000
    assert by_link.tally.swapped_bytes == by_disk.tally.swapped_bytes
    # bo waits until ada's 105 tokens have left and computes 888; ada waits until they are back and computes 15.
    assert by_disk.tally.first_token_s == pytest.approx([1.05 + 0.888 + 0.002, 1.05 + 0.015 + 0.002])
    assert by_link.tally.first_token_s == pytest.approx([0.105 + 0.888 + 0.002, 0.105 + 0.015 + 0.002])


def test_with_append_only_what_was_added_is_written_again() -> None:
    rounds = [Turn(100 + 20 * n, 5, pause_s=10.0) for n in range(4)]
    pushing = [Turn(890 if n % 2 else 1, 1, pause_s=5.0) for n in range(8)]
    scripts = [alone("ada", *rounds), alone("bo", *pushing)]
    room = Room(900, 0, 1 << 30)
    whole = play(World(scripts, PLAIN, room, plan("swap")))
    added = play(World(scripts, PLAIN, room, plan("swap+append")))
    assert 0 < added.tally.disk_bytes < whole.tally.disk_bytes


def test_a_host_tier_that_follows_the_tools_gives_way_to_them_and_a_fixed_one_makes_them_stand() -> None:
    hungry = Tool("pytest", 10.0, ((0.0, MIB), (4.0, 600 * MIB)))
    scripts = [
        alone("ada", Turn(400_000, 1, pause_s=30.0), Turn(400_010, 1)),
        alone("bo", Turn(1, 1, pause_s=0.0), Turn(500_000, 1, (hungry,))),
        alone("cyd", Turn(1, 1, (replace(hungry, seconds=20.0),))),
    ]
    machine = replace(PLAIN, cost=replace(PLAIN.cost, prefill_seconds_per_token=1e-5, host_bytes_per_second=1e9))
    room = Room(600_000, 1000 * MIB)
    fixed = play(World(scripts, machine, room, plan("worth+split=0.5")))
    follows = play(World(scripts, machine, room, plan("worth+follow")))
    assert fixed.tally.kill_count or fixed.tally.stalled_s > 0
    assert follows.tally.kill_count == 0
    assert follows.tally.stalled_s < fixed.tally.stalled_s or fixed.tally.kill_count


def test_without_anybody_who_keeps_the_tools_the_largest_is_killed_and_its_turn_is_not_counted() -> None:
    big, small = Tool("cc", 5.0, ((1.0, 700 * MIB),)), Tool("cc", 5.0, ((2.0, 400 * MIB),))
    scripts = [alone("ada", Turn(10, 1, (big,)), Turn(20, 1)), alone("bo", Turn(10, 1, (small,)), Turn(20, 1))]
    world = play(World(scripts, PLAIN, Room(1000, 1000 * MIB), plan("none")))
    assert world.plan.keeping is Keeping.NOBODY
    assert [agent.killed_count for agent in world.agents] == [1, 0]
    assert world.tally.turn_count == 3 and world.tally.spoilt_count == 1


def test_decode_stands_still_while_a_prompt_is_computed() -> None:
    long = alone("bo", Turn(1, 1, pause_s=0.3), Turn(5000, 1))
    world = play(World([alone("ada", Turn(10, 20)), long], PLAIN, Room(100_000, 1 << 30), plan("drop")))
    alone_s = play(World([alone("ada", Turn(10, 20))], PLAIN, Room(100_000, 1 << 30), plan("drop"))).now_s
    done_s = world.agents[0].done_s
    assert done_s is not None and done_s > alone_s + 4.9


def test_behind_the_door_fewer_are_awake_and_all_are_done_sooner() -> None:
    scripts = [alone(f"a{n}", *[Turn(20_000 + 100 * k, 5, pause_s=5.0) for k in range(8)]) for n in range(6)]
    open_ = play(World(scripts, PLAIN, Room(70_000, 0), plan("drop")))
    shut = play(World(scripts, PLAIN, Room(70_000, 0), plan("drop+door")))
    assert shut.tally.recomputed_tokens < open_.tally.recomputed_tokens
    assert shut.now_s < open_.now_s


@pytest.mark.parametrize("name", [*WHAT_THEY_ARE, "minwaste+append+near+door", "economy-door", "worth+split=0.25"])
def test_every_policy_by_name_brings_every_agent_to_its_end(name: str) -> None:
    world = play(tight(7, 8, name))
    turns = sum(len(agent.script.turns) for agent in world.agents)
    assert world.tally.turn_count + world.tally.spoilt_count == turns
    score = world.score()
    assert score.policy == name and score.turns_per_minute > 0
    if name not in ("none", "ladder", "decide"):
        assert score.kills == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 10),
    st.sampled_from(("drop", "swap", "ttl", "minwaste", "worth")),
    st.sampled_from(PARTS),
    st.sampled_from((0, 1 << 33, 1 << 40)),
    st.sampled_from(sorted(MACHINES)),
)
def test_under_any_rule_books_add_up_and_nobody_starves(
    seed: int, agents: int, rule: str, part: str, disk_bytes: int, machine: str
) -> None:
    world = play(tight(seed, agents, rule + part, MACHINES[machine], disk_bytes))
    for seat in world.engine.seats:
        assert not seat.held_tokens and not seat.host_tokens and not seat.disk_tokens
    assert world.engine.tiers.booked_tokens == 0
    assert world.tools.used_bytes == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(("decide", "economy", "minwaste+append+near")))
def test_the_same_seed_gives_the_same_run(seed: int, name: str) -> None:
    assert play(tight(seed, 6, name)).score() == play(tight(seed, 6, name)).score()


def test_a_steady_loop_goes_on_and_counts_from_the_warm_up_on() -> None:
    scripts = random_scripts(3, 6)
    room = room_for(scripts, PLAIN, 0.5, 1.0, 0)
    world = World(scripts, PLAIN, room, plan("drop"), steady=True).run(500.0)
    world.measure_from_now()
    assert world.score().turns == 0
    world.run(1500.0)
    assert not world.done
    assert world.score().span_s == pytest.approx(1000.0)
    assert world.score().turns > 0


def test_a_turn_that_no_device_of_this_size_can_hold_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        World([alone("ada", Turn(1000, 5))], PLAIN, Room(1000, 0), plan("drop"))


def test_service_between_tenants_follows_their_weights_where_the_rule_is_fair() -> None:
    scripts = [
        alone(f"{tenant}{n}", *[Turn(200 + 20 * k, 40, pause_s=0.1) for k in range(20)], tenant=tenant)
        for tenant in ("gold", "bronze")
        for n in range(4)
    ]
    weights = {"gold": 4.0, "bronze": 1.0}
    worlds = [
        World(scripts, PLAIN, Room(1500, 0), plan(name), weights=weights, steady=True).run(1500.0)
        for name in ("drop", "drop+fair")
    ]
    unfair, fair = (world.score().fairness_gap for world in worlds)
    assert unfair is not None and fair is not None and fair < unfair
