"""The mix under a daemon: every agent of the plan in a sandbox of its own, all at the same time, and the score.

Of the daemon it asks ListToolCalls, and its log which role it gave each process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from equipoise.tests.agents.mix.plan import FILES, MARK, SHIMS, Plan, plans
from equipoise.tests.agents.mix.score import Said, Score, Thing, score
from equipoise.tests.agents.mix.witness import Witness
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon

POLICY = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: mix}
spec:
  mode: enforce
  tenants: {gold: {weight: 1}}
  memory:
    toolPool: 4GiB
    budget: {soft: 48MiB, hard: 64MiB, step: 32MiB, max: 96MiB, bends: false}
    maxWait: 1s
"""
_NUMBER = count(1)
_ROLE = re.compile(r'\brole(?:_anew)? pid=(\d+) role=("[^"]*"|\S+)')
_RUNTIME = re.compile(r"\bruntime_found pid=(\d+)")
AGENT_S = 180.0
SETTLE_S = 2.0
"""How long after the last agent's end the daemon may take to have said everything: a line without a program takes a
second."""


def run(daemon: RunningDaemon, calls: int, folder: Path, *, heard: bool) -> Score:
    """`folder` must not exist. `heard`: an engine tells the daemon what the conversations ask for."""
    made = _prepare(folder, calls)
    names = {plan.name: f"mix-{plan.name}-{next(_NUMBER)}" for plan in made}
    witness = Witness(f"unix:{daemon.socket}", silent=not heard).start()
    agents = {}
    try:
        for plan in made:
            agents[plan.name] = _start(daemon, plan, names[plan.name], folder, witness.port)
        for name, process in agents.items():
            said = process.communicate(timeout=AGENT_S)[0]
            assert process.returncode == 0, f"agent {name} ended with {process.returncode}: {said[-3000:]}"
        time.sleep(SETTLE_S)
    finally:
        for process in agents.values():
            if process.poll() is None:
                process.kill()
                process.communicate()
        witness.close()
    things = [thing for plan in made for thing in _things(plan.name, folder / f"{plan.name}.log")]
    steps = {step.number: step for plan in made for step in plan.steps}
    return score(steps, things, _said(daemon, names), *_logged(daemon), heard=heard)


def _prepare(folder: Path, calls: int) -> list[Plan]:
    (folder / "shims").mkdir(parents=True)
    for name, text in SHIMS.items():
        (folder / "shims" / name).write_text(text)
        (folder / "shims" / name).chmod(0o755)
    made = plans(calls, folder=folder)
    for plan in made:
        (folder / f"{plan.name}.json").write_text(json.dumps(plan.as_json(folder)))
    return made


def _start(daemon: RunningDaemon, plan: Plan, name: str, folder: Path, port: int) -> subprocess.Popen[str]:
    script = folder / FILES.get(plan.profile, f"{plan.name}-agent.py")
    script.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("agent.py"), script)
    argv = [sys.executable, str(script), str(folder / f"{plan.name}.json"), str(folder / f"{plan.name}.log"), str(port)]
    launcher = {"unknown": ["timeout", "170"], "burst": ["env", "MIX=1"]}.get(plan.name, [])
    return subprocess.Popen(
        [*CLI, "run", "--tenant", "gold", "--name", name, "--", *launcher, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket)},
    )


def _things(agent: str, log: Path) -> list[Thing]:
    return [Thing(agent, *json.loads(line)) for line in log.read_text().splitlines()]


def _said(daemon: RunningDaemon, names: dict[str, str]) -> list[Said]:
    agent_of = {name: agent for agent, name in names.items()}
    rows = []
    for view in daemon.tool_calls():
        if view.sandbox in agent_of:
            code = view.exit_code if view.HasField("exit_code") else None
            number = view.signal if view.HasField("signal") else None
            rows.append(
                Said(
                    agent=agent_of[view.sandbox],
                    pid=view.pid,
                    command=view.command,
                    start_ns=view.start_ns,
                    end_ns=view.end_ns or None,
                    code=code,
                    signal=number,
                    escaped_count=view.escaped_count,
                    call_id=view.agent_call_id,
                )
            )
    return rows


def _logged(daemon: RunningDaemon) -> tuple[dict[int, str], dict[int, int]]:
    """By pid, in the daemon's log: what it took the process for last, and whose mark its first arguments had."""
    roles: dict[int, str] = {}
    marks: dict[int, int] = {}
    for line in daemon.log.read_text(errors="replace").splitlines():
        if found := _ROLE.search(line):
            roles[int(found[1])] = found[2].strip('"')
            if mark := MARK.search(line):
                marks[int(found[1])] = int(mark[1])
        elif found := _RUNTIME.search(line):
            roles[int(found[1])] = "runtime"
    return roles, marks
