"""The memory economy against its rivals, in the what-if world: `make bench-economy`.

`python -m equipoise.tests.bench.economy published parts` runs the named parts only; `--seeds 1,2` fewer seeds. Virtual
time: the figures do not depend on this machine's speed. On the recorded agents where they are there, else on random
ones; which, each row says. `economy` is the rule of the world's engine; `decide` what the daemon decides today.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Literal

from equipoise.daemon import recordings, whatif
from equipoise.policies.world.bound import Bound
from equipoise.policies.world.score import Score
from equipoise.policies.world.script import Script

from .report import Baseline, Row, of_runs, publish

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "agent_traces_glm.jsonl.gz"
OURS = "economy"
PUBLISHED = ("drop", "swap", "ttl", "minwaste")
DISKS = {"3 GB/s": 3e9, "0.5 GB/s": 5e8, "no disk": 0.0}
ABLATED = ("worth", "follow", "append", "near", "meet", "door", "prefetch", "fair")
SPLITS = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class Case:
    machine: str = "h100-8b"
    disk: float = 3e9
    agents: int = 24
    kv: float = 0.25
    ram: float = 0.5
    tools: float = 1.0
    seed: int = 1

    @property
    def setting(self) -> whatif.Setting:
        made = whatif.machine(self.machine, self.disk)
        return whatif.Setting(made, self.agents, self.seed, self.kv, self.ram)


@cache
def _recorded(scale: float, tools: float) -> tuple[Script, ...]:
    return tuple(recordings.read([TRACES], scale, tools)) if TRACES.exists() else ()


def _scripts(case: Case) -> list[Script]:
    # The recorded contexts are too long for the small machine's model.
    return whatif.scripts_for(_recorded(1 / 60 if case.machine == "cpu" else 1.0, case.tools), case.setting)


@cache
def play(name: str, case: Case) -> Score:
    ((plan, policy),) = whatif.plans([name])
    print(f"  {name} {case}", file=sys.stderr, flush=True)
    return whatif.play(_scripts(case), plan, policy, case.setting)


def rate(name: str, case: Case) -> float:
    return play(name, case).turns_per_minute


def best(names: Sequence[str], cases: Sequence[Case]) -> str:
    return max(names, key=lambda name: fmean(rate(name, case) for case in cases))


def of_cases(
    label: str,
    cases: Sequence[Case],
    rivals: Sequence[str],
    target: float | None,
    figure: Callable[[Score], float | None] = lambda score: score.turns_per_minute,
    better: Literal["lower", "higher"] = "higher",
) -> Row:
    """Ours over the best of the rivals (by mean goodput), a run a seed."""
    rival = best(rivals, cases)
    pairs = [(figure(play(OURS, case)) or 0.0, figure(play(rival, case)) or 1e-9) for case in cases]
    runs = [mine / theirs for mine, theirs in pairs]
    base = Baseline(rival, fmean(theirs for _, theirs in pairs))
    return of_runs(label, runs, "x", target, base, _note(), better)


def _note() -> str:
    return "recorded agents" if TRACES.exists() else f"random agents: {TRACES.name} is not there"


def published(seeds: Sequence[int]) -> list[Row]:
    """Against what is published, with a fixed host tier of half the RAM, in order of arrival."""
    rows = []
    for name, disk in DISKS.items():
        cases = [Case(disk=disk, seed=seed) for seed in seeds]
        rows.append(of_cases(f"goodput over the best published, {name}", cases, PUBLISHED, 1.6))
        rows.append(of_cases(f"p99 of a resumed first token, {name}", cases, PUBLISHED, 0.7, _p99, "lower"))
        rows.append(_p50(f"p50 of a resumed first token, {name}", cases, 2.0 if disk == 3e9 else None))
        rows += _of_bound(name, cases)
        rows.append(_today(name, cases))
    overload = [Case(agents=48, kv=0.125, seed=seed) for seed in seeds]
    return [*rows, of_cases("goodput over the best published, 48 agents, an eighth", overload, PUBLISHED, 2.0)]


def _p99(made: Score) -> float | None:
    return made.first_token_p99_s


def _p50(label: str, cases: Sequence[Case], target: float | None) -> Row:
    rival = best(PUBLISHED, cases)
    base = Baseline(rival, fmean(play(rival, case).first_token_p50_s or 0.0 for case in cases))
    return of_runs(label, [play(OURS, case).first_token_p50_s or 0.0 for case in cases], "s", target, base, _note())


def _of_bound(name: str, cases: Sequence[Case]) -> list[Row]:
    shares = []
    for case in cases:
        most = whatif.bound_of(_scripts(case), case.setting)
        if not isinstance(most, Bound):
            return [Row(f"share of the bound, {name}", float("nan"), "", None, "higher", note=most)]
        shares.append(rate(OURS, case) / most.turns_per_minute)
    return [of_runs(f"share of the bound, {name}", shares, "", 0.75, None, _note(), "higher")]


def _today(name: str, cases: Sequence[Case]) -> Row:
    runs = [rate("decide", case) / rate("drop", case) for case in cases]
    base = Baseline("drop", fmean(rate("drop", case) for case in cases))
    return of_runs(f"decide() of today, {name}", runs, "x", None, base, _note(), "higher")


def parts(seeds: Sequence[int]) -> list[Row]:
    """What each part is worth: goodput of the whole over the whole without it; below 1.01 everywhere it should go."""
    rows = []
    for name, disk in DISKS.items():
        cases = [Case(disk=disk, seed=seed) for seed in seeds]
        for part in ABLATED:
            without = f"{OURS}-{part}"
            runs = [rate(OURS, case) / rate(without, case) for case in cases]
            base = Baseline(without, fmean(rate(without, case) for case in cases))
            rows.append(of_runs(f"worth of {part}, {name}", runs, "x", None, base, _note(), "higher"))
    return rows


def hindsight(seeds: Sequence[int]) -> list[Row]:
    """Against InferCept's rule with append, nearest first and a door of its own, at the best of five splits."""
    rows = []
    for name, disk in DISKS.items():
        cases = [Case(disk=disk, seed=seed) for seed in seeds]
        rivals = [f"minwaste+append+near{door}+split={split:g}" for split in SPLITS for door in ("", "+door")]
        rows.append(of_cases(f"over the best split in hindsight, {name}", cases, rivals, 1.2 if not disk else 0.98))
        stood = [play(OURS, case).stalled_s for case in cases]
        rows.append(of_runs(f"tools stand for want of RAM, {name}", stood, "s", 0.0, None, _note()))
    return rows


def machines(seeds: Sequence[int]) -> list[Row]:
    """Never below the best rival by more than 2 % on other machines, few agents or many, little RAM or enough."""
    rows = []
    rivals = (*PUBLISHED, "minwaste+append+near", "minwaste+append+near+door")
    for machine in ("unified", "cpu"):
        for agents, ram, tools in ((8, 0.25, 1.0), (24, 0.5, 1.0), (24, 0.5, 4.0), (64, 1.0, 1.0)):
            cases = [Case(machine, agents=agents, ram=ram, tools=tools, seed=seed) for seed in seeds[:2]]
            rows.append(of_cases(f"{machine}, {agents} agents, RAM {ram:g}, tools x{tools:g}", cases, rivals, 0.98))
    return rows


def speed(_: Sequence[int]) -> list[Row]:
    """All recordings one after another under decide(): how long the replay itself takes."""
    import time

    if not TRACES.exists():
        return [Row("all recordings one after another", float("nan"), "s", None, note=_note())]
    setting = replace(Case().setting, each=True)
    ((plan, policy),) = whatif.plans(["decide"])
    began = time.perf_counter()
    whatif.play(whatif.scripts_for(_recorded(1.0, 1.0), setting), plan, policy, setting)
    return [Row("all recordings one after another", time.perf_counter() - began, "s", 20.0, note=_note())]


PARTS: dict[str, Callable[[Sequence[int]], list[Row]]] = {
    "published": published,
    "parts": parts,
    "hindsight": hindsight,
    "machines": machines,
    "speed": speed,
}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    arguments = parser.parse_args(words)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows: list[Row] = []
    for name in arguments.parts or PARTS:
        print(f"economy: {name} ...", file=sys.stderr, flush=True)
        rows += PARTS[name](seeds)
    publish("economy" if not arguments.parts else f"economy-{'-'.join(arguments.parts)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
