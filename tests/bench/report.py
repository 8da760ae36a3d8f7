"""The one shape of a bench: rows with target, baseline and every run, as JSON and as a table on the screen.

Owns the file format (DESIGN.md, "Benches: one shape") and the machine's description; measures nothing.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

OUT = Path(__file__).resolve().parents[2] / "build" / "bench"


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the value is held against: the same thing without us, or the way a peer does it, from the same run."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    value: float
    unit: str
    target: float | None
    """None: no target, a figure to know."""
    better: Literal["lower", "higher"] = "lower"
    baseline: Baseline | None = None
    runs: Sequence[float] = ()
    note: str = ""
    met: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.target is not None:
            met = self.value <= self.target if self.better == "lower" else self.value >= self.target
            object.__setattr__(self, "met", met)


def of_runs(
    name: str,
    runs: Sequence[float],
    unit: str,
    target: float | None,
    baseline: Baseline | None = None,
    note: str = "",
    better: Literal["lower", "higher"] = "lower",
) -> Row:
    """A row whose value is the median of its runs."""
    return Row(name, median(runs), unit, target, better, baseline, tuple(round(run, 4) for run in runs), note)


def machine() -> dict[str, object]:
    """CPU, memory and kernel, for whoever reads the figures elsewhere."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": pages,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def publish(family: str, rows: Sequence[Row]) -> Path:
    """Write build/bench/FAMILY.json, print the table, return the file."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{family}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    width = max((len(row.name) for row in rows), default=0)
    print(f"{family}: {path}")
    for row in rows:
        sign = {True: "met", False: "MISSED", None: ""}[row.met]
        target = "" if row.target is None else f"{'<=' if row.better == 'lower' else '>='} {row.target:g}"
        against = f"{row.baseline.name}: {row.baseline.value:.4g}" if row.baseline else ""
        print(f"  {row.name:<{width}}  {row.value:>10.4g} {row.unit:<6} {target:<10} {sign:<7} {against}")
    return path
