"""`python -m equipoise.tests.agents.mix`: a scripted mix of 400 tool calls under the daemon, and how well it knew them.

Once with the conversation told by an engine, once without. Needs root and eBPF. Exit code: 0 where precision and
recall are 0.99 or more in each, 1 where one is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from equipoise.tests.agents.mix.score import table
from equipoise.tests.agents.mix.trial import POLICY, run
from equipoise.tests.fixtures.running_daemon import RunningDaemon

TARGET = 0.99


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m equipoise.tests.agents.mix", description=__doc__)
    parser.add_argument("--calls", type=int, default=400, help="about so many (default: 400)")
    parser.add_argument("--only", choices=("heard", "shape"), help="with the conversation, or without it")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="equipoise-mix-"))
    daemon = RunningDaemon(folder, POLICY)
    met = True
    try:
        daemon.start("--verbose")
        for name, heard in (("heard", True), ("shape", False)):
            if options.only in (None, name):
                began = time.monotonic()
                result = run(daemon, options.calls, folder / name, heard=heard)
                print(f"== {name}: {time.monotonic() - began:.1f} s\n{table(result)}\n", flush=True)
                met = met and result.precision >= TARGET and result.recall >= TARGET
        print(f"daemon log: {daemon.log}")
    finally:
        daemon.close()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
