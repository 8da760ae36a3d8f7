"""`equipoise replay`: what would another policy have done? Owns parsing and printing; whatif.py plays."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...policies.document import DocumentError, parse_bytes
from ...policies.world.bound import Bound
from ...policies.world.machine import MACHINES
from ...policies.world.names import WHAT_THEY_ARE
from ...policies.world.score import Score
from .. import recordings, whatif
from ..errors import CommandError

_POLICIES = ("drop", "minwaste+append+near", "decide", "economy")
_EXAMPLES = """examples:
  equipoise replay                                          random agents, four policies
  equipoise replay --policy decide --policy economy traces.jsonl.gz
  equipoise replay --policy minwaste+append+door=0.9 --disk none traces.jsonl.gz
  equipoise replay --policy laptop --policy my-policy.yaml --machine this /run/equipoise/journal.sqlite
  equipoise replay --each --policy decide --json traces.jsonl.gz

policies:
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    width = max(map(len, WHAT_THEY_ARE))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in WHAT_THEY_ARE.items())
    parts = "  Each takes parts: NAME+append+near=60+door-fair; FILE.yaml is decide() under that policy document.\n"
    parts += "  Of decide: decide+door=0.9 holds who does not fit; decide-marginal, -need, -copies take a part out.\n"
    parser = commands.add_parser(
        "replay",
        help="play recorded agents under other policies, in virtual time",
        description="Play recorded agents, or random ones, under policies by name: nothing on this host is touched.",
        epilog=_EXAMPLES + listed + "\n" + parts,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("traces", nargs="*", type=Path, metavar="TRACE", help="JSON lines (gzip or not) of recorded runs, or a "
        "daemon's journal (default: random agents)")  # fmt: skip
    add("--policy", action="append", metavar="NAME", help="may be given again (default: "
        f"{', '.join(_POLICIES)})")  # fmt: skip
    add("--machine", default="h100-8b", metavar="NAME", help=f"{', '.join(MACHINES)}, this (fitted here), or a JSON "
        "file of figures (default: %(default)s)")  # fmt: skip
    add("--agents", type=_count, default=24, help="at once, in a steady loop (default: %(default)s)")
    add("--seed", type=int, default=1, help="who plays (default: %(default)s)")
    add("--kv", type=_ratio, default=0.25, metavar="RATIO", help="device KV over the sum of the longest contexts "
        "(default: %(default)s)")  # fmt: skip
    add("--ram", type=_ratio, default=0.5, metavar="RATIO", help="host RAM over half the KV demand plus the sum of "
        "the tools' peaks (default: %(default)s)")  # fmt: skip
    add("--disk", type=_speed, metavar="3GiB", help="bytes a second, or none (default: the machine's)")
    add("--tools", type=_ratio, default=1.0, metavar="FACTOR", help="on the tools' memory (default: %(default)s)")
    add("--scale", type=_ratio, default=1.0, metavar="FACTOR", help="on token counts (default: %(default)s)")
    add("--tenants", type=_tenants, default=(("default", 1.0),), metavar="gold=4,silver=1", help="names and weights; "
        "agents belong to them in turn (default: one)")  # fmt: skip
    add("--seconds", type=_ratio, default=1800.0, help="of virtual time (default: %(default)s)")
    add("--warm-up", type=_ratio, default=300.0, metavar="SECONDS", help="not measured (default: %(default)s)")
    add("--each", action="store_true", help="every recording alone, one after another, to its end")
    add("--no-bound", action="store_true", help="do without the bound that no policy can exceed")
    add("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_replay)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _speed(text: str) -> float:
    if text == "none":
        return 0.0
    try:
        return float(parse_bytes(text.removesuffix("/s"), "value"))
    except DocumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tenants(text: str) -> tuple[tuple[str, float], ...]:
    made = []
    for entry in text.split(","):
        name, _, weight = entry.partition("=")
        if not name:
            raise argparse.ArgumentTypeError(f"{text}: NAME=WEIGHT, comma separated")
        made.append((name, _ratio(weight) if weight else 1.0))
    if len(dict(made)) < len(made):
        raise argparse.ArgumentTypeError(f"{text}: a tenant twice")
    return tuple(made)


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.each and not arguments.traces:
        raise CommandError("nothing to play one after another: give a trace file with --each")
    if arguments.warm_up >= arguments.seconds:
        raise CommandError(f"--warm-up {arguments.warm_up:g} leaves nothing of --seconds {arguments.seconds:g}")
    setting = whatif.Setting(
        machine=whatif.machine(arguments.machine, arguments.disk),
        agents=arguments.agents,
        seed=arguments.seed,
        kv_ratio=arguments.kv,
        ram_ratio=arguments.ram,
        seconds=arguments.seconds,
        warm_up_s=arguments.warm_up,
        tenants=arguments.tenants,
        each=arguments.each,
    )
    plans = whatif.plans(arguments.policy or _POLICIES)
    recorded = recordings.read(arguments.traces, arguments.scale, arguments.tools) if arguments.traces else []
    scripts = whatif.scripts_for(recorded, setting)
    limit = "left out" if arguments.no_bound else whatif.bound_of(scripts, setting)
    scores = []
    for number, (plan, policy) in enumerate(plans, 1):
        with _bar(f"{plan.name} ({number} of {len(plans)})") as progress:
            made = whatif.play(scripts, plan, policy, setting, progress)
        if isinstance(limit, Bound) and not plan.unlimited:
            made = replace(made, bound_ratio=made.turns_per_minute / limit.turns_per_minute)
        scores.append(made)
    if arguments.json:
        print(json.dumps(_as_dict(setting, len(scripts), limit, scores), indent=1))
    else:
        _table(setting, len(scripts), limit, scores)
    return 0


@contextmanager
def _bar(text: str) -> Iterator[whatif.Progress | None]:
    """A bar on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _as_dict(setting: whatif.Setting, agents: int, limit: Bound | str, scores: list[Score]) -> dict[str, object]:
    told: dict[str, object] = {"absent": limit}
    if isinstance(limit, Bound):
        told = {"turns_per_minute": limit.turns_per_minute, "rents": limit.rents, "shares": limit.shares}
    return {
        "setting": {**asdict(setting), "machine": setting.machine.name, "disk_bytes_per_second": _disk(setting)}
        | {"agents": agents},
        "bound": told,
        "policies": [asdict(made) for made in scores],
    }


def _disk(setting: whatif.Setting) -> float:
    return setting.machine.cost.disk_bytes_per_second


_COLUMNS: tuple[tuple[str, Callable[[Score], str]], ...] = (
    ("TURNS/MIN", lambda s: f"{s.turns_per_minute:.1f}"),
    ("OF BOUND", lambda s: _number(s.bound_ratio, 2)),
    ("FIRST TOKEN p50", lambda s: _number(s.first_token_p50_s, 2)),
    ("p95", lambda s: _number(s.first_token_p95_s, 1)),
    ("p99 s", lambda s: _number(s.first_token_p99_s, 1)),
    ("TOOL p50", lambda s: _number(s.tool_p50_s, 2)),
    ("p99 s", lambda s: _number(s.tool_p99_s, 1)),
    ("KILLS", lambda s: str(s.kills)),
    ("STOOD s", lambda s: f"{s.stalled_s:.0f}"),
    ("SLOWED s", lambda s: f"{s.throttled_s:.0f}"),
    ("AGAIN Mtok", lambda s: f"{s.recomputed_tokens / 1e6:.2f}"),
    ("PTE M", lambda s: _number(s.pte / 1e6 if s.pte is not None else None, 1)),
    ("IDLE GiB s", lambda s: f"{s.kv_idle_gib_s:.0f}"),
    ("SWAPPED GiB", lambda s: f"{s.swapped_gib:.0f}"),
    ("GAP", lambda s: _number(s.fairness_gap, 2)),
)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(setting: whatif.Setting, agents: int, limit: Bound | str, scores: list[Score]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    disk = f"{_disk(setting) / 1e9:g} GB/s" if _disk(setting) else "none"
    how = "recordings one after another" if setting.each else f"agents, {setting.seconds:g} s of virtual time"
    console.print(f"{setting.machine.name}, disk {disk}, {agents} {how}, seed {setting.seed}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("POLICY", no_wrap=True)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right")
    for made in scores:
        table.add_row(made.policy, *(show(made) for _, show in _COLUMNS))
    console.print(table)
    if isinstance(limit, Bound):
        rents = ", ".join(f"{name} {rent:.2f}" for name, rent in limit.rents.items() if rent > 0.005)
        console.print(f"no policy exceeds {limit.turns_per_minute:.1f} turns/min; what is short: {rents or 'nothing'}")
    else:
        console.print(f"no bound: {escape(limit)}")
