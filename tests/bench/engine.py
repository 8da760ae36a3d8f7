"""The embedded engine against bare llama.cpp, llama.cpp's own server and static policies: `make bench-engine`.

`python -m equipoise.tests.bench.engine speed swap` runs the named parts only. One compute thread everywhere: figures
are ratios within one run, so that the machine's size cancels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from equipoise.gpuctl.engine.compute.language_model import LanguageModel

from .engine_parts import agents, fairness, handover, interrupt, servers, speed, swap
from .report import Row, publish

PARTS: dict[str, Callable[[LanguageModel], list[Row]]] = {
    "speed": speed.rows,
    "swap": swap.rows,
    "interrupt": interrupt.rows,
    "fairness": fairness.rows,
    "handover": handover.rows,
    "agents": agents.rows,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"no part {unknown[0]!r}: give any of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    model = LanguageModel(servers.model_path())
    rows: list[Row] = []
    for name in names or PARTS:
        print(f"engine: {name} ...", file=sys.stderr, flush=True)
        rows += PARTS[name](model)
    publish("engine" if not names else f"engine-{'-'.join(names)}", rows)
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
