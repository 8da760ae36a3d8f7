"""What-if: recorded or random agents played under policies by name, in virtual time.

Owns the settings of a replay and the order of its runs; the world is policies/world's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from ..policies.policy import Policy
from ..policies.world.bound import Bound, BoundError, bound
from ..policies.world.machine import MACHINES, Machine, machine_of
from ..policies.world.names import Plan, plan
from ..policies.world.score import Score, Tally, score
from ..policies.world.script import Script
from ..policies.world.traces import random_scripts, room_for, sample
from ..policies.world.world import World
from .errors import CommandError
from .policy import BUILTINS, Sources

DISK_BYTES = 1 << 40
RANDOM_TURNS = 24
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """The world that all policies of a replay are played in."""

    machine: Machine
    agents: int = 24
    seed: int = 1
    kv_ratio: float = 0.25
    """Device KV over the sum of the agents' longest contexts."""
    ram_ratio: float = 0.5
    """Host RAM over half the bytes of that sum plus the sum of the tools' peaks."""
    seconds: float = 1800.0
    """Of virtual time, the warm-up included."""
    warm_up_s: float = 300.0
    tenants: tuple[tuple[str, float], ...] = (("default", 1.0),)
    """Names and weights; agents belong to them in turn."""
    each: bool = False
    """Every recording alone, one after another, instead of a steady loop of all agents."""


def machine(name: str, disk_bytes_per_second: float | None) -> Machine:
    """A built-in machine, `this` (what the embedded engine fitted here), or a JSON file of figures.

    Raises:
        CommandError: there is none; says what there is.
    """
    made = MACHINES.get(name)
    if made is None:
        path = _newest_fit() if name == "this" else Path(name)
        try:
            made = machine_of(name if name == "this" else path.name, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            choices = ", ".join([*MACHINES, "this"])
            raise CommandError(f"machine {path}: {reason}: give one of {choices}, or a JSON file of figures") from error
    if disk_bytes_per_second is None:
        return made
    return replace(made, cost=replace(made.cost, disk_bytes_per_second=disk_bytes_per_second))


def _newest_fit() -> Path:
    try:
        from ..gpuctl.engine.compute.model import cache_folder
    except ImportError as error:
        raise CommandError(
            f"machine this: the engine that fits it needs {error.name}: pip install 'equipoise[engine]'"
        ) from error
    kept = sorted(cache_folder().glob("cost-*.json"), key=lambda path: path.stat().st_mtime)
    if not kept:
        raise CommandError("machine this: not fitted yet: start `equipoise engine` once, or name another machine")
    return kept[-1]


def plans(names: Sequence[str]) -> list[tuple[Plan, Policy | None]]:
    """Policies by name; a policy document's path stands for decide() under that document.

    Raises:
        CommandError: no such policy or document.
    """
    made: list[tuple[Plan, Policy | None]] = []
    for name in names:
        if name in BUILTINS or name.endswith((".yaml", ".yml")):
            made.append((replace(plan("decide"), name=Path(name).stem), Sources((name,)).load()))
            continue
        try:
            made.append((plan(name), None))
        except ValueError as error:
            raise CommandError(str(error)) from error
    return made


def scripts_for(recorded: Sequence[Script], setting: Setting) -> list[Script]:
    """Who plays: drawn from the recordings by the seed, or random ones where there are none; tenants in turn.

    Raises:
        CommandError: no recording is long enough.
    """
    names = [name for name, _ in setting.tenants]
    if not recorded:
        return random_scripts(setting.seed, setting.agents, names, RANDOM_TURNS)
    drawn = list(recorded) if setting.each else sample(recorded, setting.agents, setting.seed)
    if not drawn:
        raise CommandError("no recording has turns enough for a steady loop: play each alone (--each)")
    return [replace(script, tenant=names[number % len(names)]) for number, script in enumerate(drawn)]


def play(
    scripts: Sequence[Script], of: Plan, policy: Policy | None, setting: Setting, progress: Progress | None = None
) -> Score:
    """One policy on these scripts. `progress` is told how much of the run is done, 0 to 1."""
    return (
        _each(scripts, of, policy, setting, progress) if setting.each else _loop(scripts, of, policy, setting, progress)
    )


def _world(scripts: Sequence[Script], of: Plan, policy: Policy | None, setting: Setting, steady: bool) -> World:
    room = room_for(scripts, setting.machine, setting.kv_ratio, setting.ram_ratio, DISK_BYTES)
    weights: Mapping[str, float] = dict(setting.tenants)
    return World(scripts, setting.machine, room, of, policy=policy, weights=weights, steady=steady)


def _loop(
    scripts: Sequence[Script], of: Plan, policy: Policy | None, setting: Setting, progress: Progress | None
) -> Score:
    def told(now_s: float) -> None:
        if progress is not None:
            progress(now_s / setting.seconds)

    world = _world(scripts, of, policy, setting, steady=True).run(setting.warm_up_s, told)
    world.measure_from_now()
    return world.run(setting.seconds, told).score()


def _each(
    scripts: Sequence[Script], of: Plan, policy: Policy | None, setting: Setting, progress: Progress | None
) -> Score:
    total, now_s = Tally(), 0.0
    for number, script in enumerate(scripts):
        world = _world([script], of, policy, setting, steady=False).run(inf)
        total.take(world.tally)
        now_s += world.now_s
        if progress is not None:
            progress((number + 1) / len(scripts))
    disk = setting.machine.cost.disk_bytes_per_second
    return score(of.name, total, now_s, dict(setting.tenants), setting.machine.gamma, disk)


def bound_of(scripts: Sequence[Script], setting: Setting) -> Bound | str:
    """The bound of the steady loop, or why there is none."""
    if setting.each:
        return "recordings played one after another have none"
    room = room_for(scripts, setting.machine, setting.kv_ratio, setting.ram_ratio, DISK_BYTES)
    try:
        return bound(scripts, setting.machine, room)
    except BoundError as error:
        return str(error)
