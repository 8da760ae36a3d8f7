"""The bound that nobody can beat, and what it says of a world that is roomy or short."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.world.bound import bound
from equipoise.policies.world.machine import MACHINES
from equipoise.policies.world.names import plan
from equipoise.policies.world.traces import random_scripts, room_for
from equipoise.policies.world.world import Room, World

pytest.importorskip("scipy", reason="the bound is solved by scipy: pip install 'equipoise[whatif]'")

POLICIES = ("drop", "swap+append", "minwaste+append+near", "economy", "economy-door", "worth+follow+behind+near+meet")


@pytest.mark.parametrize(("seed", "machine"), [(seed, sorted(MACHINES)[seed % 4 % 3]) for seed in range(12)])
def test_no_policy_plays_all_scripts_in_less_than_the_bound(seed: int, machine: str) -> None:
    on = MACHINES[machine]
    disk = (3e9, 5e8, 0.0)[seed % 3]
    on = replace(on, cost=replace(on.cost, disk_bytes_per_second=disk))
    scripts = random_scripts(seed, 4 + seed)
    room = room_for(scripts, on, 0.25, 0.5, 1 << 40)
    least = bound(scripts, on, room, steady=False)
    for name in POLICIES:
        world = World(scripts, on, room, plan(name)).run()
        if world.tally.kill_count == 0:
            assert world.now_s >= least.seconds * (1 - 1e-6), name


@pytest.mark.parametrize("seed", range(2))
def test_no_policy_beats_the_bound_of_a_steady_loop_over_many_rounds(seed: int) -> None:
    """The mix of a window is not quite that of all scripts: 2 %."""
    on = MACHINES["h100-8b"]
    scripts = random_scripts(seed, 8)
    room = room_for(scripts, on, 0.25, 0.5, 1 << 40)
    most = bound(scripts, on, room).turns_per_minute
    for name in ("minwaste+append+near", "economy", "unlimited"):
        world = World(scripts, on, room, plan(name), steady=True).run(200.0)
        world.measure_from_now()
        reached = world.run(1500.0).score().turns_per_minute
        if name == "unlimited":
            most = bound(scripts, on, Room(1 << 40, 1 << 50, 0)).turns_per_minute
        assert reached <= 1.02 * most, name


def test_in_a_roomy_world_nothing_costs_rent_and_all_kv_stays() -> None:
    scripts = random_scripts(1, 6)
    roomy = bound(scripts, MACHINES["h100-8b"], Room(1 << 40, 1 << 50, 0), steady=False)
    assert all(rent == pytest.approx(0.0, abs=1e-6) for rent in roomy.rents.values())
    world = World(scripts, MACHINES["h100-8b"], Room(1 << 40, 1 << 50, 0), plan("unlimited")).run()
    assert world.now_s <= 1.3 * roomy.seconds, "what is left is the queue for the compute"


def test_less_room_never_raises_the_bound_and_at_last_lowers_it() -> None:
    on = replace(MACHINES["h100-8b"], cost=replace(MACHINES["h100-8b"].cost, disk_bytes_per_second=0.0))
    scripts = random_scripts(2, 24)
    wide = room_for(scripts, on, 0.3, 1.0, 0)
    rates = []
    for share in (1.0, 0.5, 0.25, 0.1):
        short = replace(
            wide, ram_bytes=int(wide.ram_bytes * share), device_tokens=int(wide.device_tokens * share) + 40_000
        )
        rates.append(bound(scripts, on, short).turns_per_minute)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
