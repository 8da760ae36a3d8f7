"""`python -m equipoise.tests.agents`: run real agents under the daemon and print how well it knows their tool calls.

Needs root, npm (or what it installed before) and eBPF. Exit code: 0 where every score is perfect, 1 where one is not,
2 where it could not be taken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from equipoise.tests.agents.clients import CLIENTS, LAUNCHERS, launchers_of
from equipoise.tests.agents.install import CannotInstall
from equipoise.tests.agents.score import Truth
from equipoise.tests.agents.script import SCRIPTS
from equipoise.tests.agents.trial import POLICY, Apart, Trial, run, run_two
from equipoise.tests.fixtures.running_daemon import RunningDaemon


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m equipoise.tests.agents", description=__doc__)
    parser.add_argument("agents", nargs="*", metavar="AGENT", help=f"of {', '.join(CLIENTS)} (default: all)")
    parser.add_argument("--launcher", action="append", choices=LAUNCHERS, help="may be repeated (default: plain)")
    parser.add_argument("--script", choices=SCRIPTS, default="ten")
    parser.add_argument("--twice", action="store_true", help="two conversations of each at once, in one sandbox")
    parser.add_argument("--heard", action="store_true", help="the model is an engine that the daemon hears")
    parser.add_argument("--policy", type=Path, help="a policy file, with a tenant gold (default: one of our own)")
    parser.add_argument("--rows", action="store_true", help="print every row of the daemon, and what it is")
    options = parser.parse_args()
    names = options.agents or list(CLIENTS)
    if unknown := [name for name in names if name not in CLIENTS]:
        parser.error(f"no such agent: {', '.join(unknown)}")
    folder = Path(tempfile.mkdtemp(prefix="equipoise-agents-"))
    daemon = RunningDaemon(folder, options.policy.read_text() if options.policy else POLICY)
    perfect = True
    try:
        daemon.start("--verbose")
        print(f"probes {daemon.status().probe_backend}; traces in {folder}")
        print(HEADING)
        for name in names:
            client = CLIENTS[name]
            try:
                client.install()
            except CannotInstall as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            if options.twice:
                script = SCRIPTS[options.script]
                two = run_two(daemon, client, folder / f"{name}-twice", script, heard=options.heard)
                (folder / f"{name}-twice.out").write_text(two.ended.output)
                how = "apart" if two.apart else f"NOT APART: {two.sessions} for {two.expected}"
                print(line(two), f"  {how}", flush=True)
                print("".join(f"    {why}\n" for why in two.score.wrong), end="")
                perfect = perfect and two.score.perfect and two.apart
                continue
            for launcher in options.launcher or ["plain"]:
                if launcher not in launchers_of(client):
                    continue
                script = SCRIPTS[options.script]
                trial = run(daemon, client, folder / f"{name}-{launcher}", launcher, script, heard=options.heard)
                (folder / f"{name}-{launcher}.out").write_text(trial.ended.output)
                print(line(trial), flush=True)
                print(details(trial, rows=options.rows), end="", flush=True)
                perfect = perfect and trial.score.perfect
    finally:
        daemon.close()
    return 0 if perfect else 1


HEADING = f"{'agent':24} {'survived':>8} {'shown':>6} {'right':>6} {'precision':>9} {'recall':>7} {'ids':>6}   took"


def line(trial: Trial | Apart) -> str:
    score = trial.score
    right = sum(row.truth is Truth.CALL for row in score.rows)
    ids = sum(bool(row.said.call_id) for row in score.rows)
    return (
        f"{trial.name:24} {'yes' if score.survived else 'NO':>8} {len(score.rows):6} {right:3}/{score.asked_count:<2} "
        f"{score.precision:9.2f} {score.recall:7.2f} {ids:6} {trial.ended.took_s:5.1f} s"
    )


def details(trial: Trial, *, rows: bool) -> str:
    """What is not as it should be; with `rows`, everything."""
    told = [f"{truth.value} as {role}: {count}" for (truth, role), count in sorted(
        trial.score.confusion().items(), key=lambda item: item[0][0].value)]  # fmt: skip
    text = "    " + "; ".join(told) + "\n"
    text += "".join(f"    {why}\n" for why in trial.score.wrong)
    text += "".join(f"    left behind: {command[:160]}\n" for command in trial.ended.left_over)
    for row in trial.score.rows:
        if rows or row.truth is Truth.RUNTIME:
            number = "" if row.call is None else f" {row.call}"
            what = f"{row.truth.value}{number}"
            text += f"    {what:16} pid {row.said.pid:7} {row.said.peak_bytes >> 20:4} MiB  {row.said.command[:90]!r}"
            text += f"  {'; '.join(row.said.actions)}\n" if row.said.actions else "\n"
    return text


if __name__ == "__main__":
    sys.exit(main())
