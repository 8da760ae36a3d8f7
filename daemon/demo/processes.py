"""The demo's processes: the daemon, the agents in their sandboxes, and whatever they leave behind.

Owns starting and ending them. Every one gets a session of its own, so that Ctrl-C reaches this process alone and the
order in which things end is ours. Must not: speak gRPC.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..errors import DaemonError
from ..sandboxes.cgroups import CgroupDriver
from ..sandboxes.cgroups.files import Effect
from ..sandboxes.processes import tied_to_us
from .scenario import KV_DEVICE_TOKENS, KV_HOST_BYTES, Agent, Layout

_TERM_GRACE_S = 5.0
_DAEMON_GRACE_S = 15.0
_LOG_TAIL_LINES = 6
CGROUP_BASE = f"equipoise-demo-{os.getpid()}"
"""Not the daemon's default: the demo runs beside a daemon that works, and beside another demo, and what it made can be
removed as a whole."""
CLI = (sys.executable, "-m", "equipoise.daemon.cli")

Process = asyncio.subprocess.Process


class StartError(Exception):
    """The demo could not be brought up; one line and the daemon's last words."""


async def start_daemon(layout: Layout, socket: Path, model: str) -> Process:
    """Start the daemon with its embedded engine; what it prints goes to the log."""
    return await _start(
        (
            *CLI,
            "daemon",
            "--socket",
            str(socket),
            "--state-dir",
            str(layout.state),
            "--policy",
            str(layout.policy),
            "--engine",
            "embedded",
            "--engine-listen",
            "127.0.0.1:0",
            "--model",
            model,
            "--kv-tokens",
            str(KV_DEVICE_TOKENS),
            "--host-bytes",
            str(KV_HOST_BYTES),
            "--cgroup-base",
            CGROUP_BASE,
            "--metrics-listen",
            "127.0.0.1:0",
        ),
        layout.daemon_log,
    )


async def start_agent(layout: Layout, socket: Path, agent: Agent, engine_url: str, deadline_s: float) -> Process:
    """Start an agent under `equipoise run`, in a sandbox of its tenant."""
    return await _start(
        (
            *CLI,
            "run",
            "--socket",
            str(socket),
            "--tenant",
            agent.tenant,
            "--name",
            agent.name,
            "--",
            sys.executable,
            "-m",
            "equipoise.daemon.demo.agents.agent",
            "--plan",
            agent.plan.name,
            "--name",
            agent.name,
            "--engine-url",
            engine_url,
            "--workdir",
            str(layout.workdir(agent)),
            "--deadline",
            f"{deadline_s:.1f}",
            "--log",
            str(layout.agent_log(agent)),
        ),
        layout.agent_output(agent),
        EQUIPOISE_SOCKET=str(socket),
    )


async def _start(argv: Sequence[str], log: Path, **environment: str) -> Process:
    with log.open("ab") as out:
        return await asyncio.create_subprocess_exec(
            *tied_to_us(argv),  # a demo that is killed takes its processes with it
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def last_words(log: Path) -> str:
    """The end of a log, for an error message."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def engine_died(daemon_log: Path) -> bool:
    """Whether the daemon says that its engine ended; it would try again and again."""
    return "engine_died" in daemon_log.read_text(errors="replace")


async def end(process: Process, grace_s: float = _TERM_GRACE_S) -> int:
    """Ask a process and its group to end, insist after `grace_s`; its return code. Safe when it is gone."""
    if process.returncode is not None:
        return process.returncode
    _signal_group(process.pid, signal.SIGTERM)
    try:
        return await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        _signal_group(process.pid, signal.SIGKILL)
        return await process.wait()


async def end_daemon(process: Process, socket: Path) -> bool:
    """End the daemon; False where it had to be killed (what it held back is then released by a second process)."""
    if process.returncode is not None:
        clean = process.returncode == 0
    else:
        process.send_signal(signal.SIGTERM)
        try:
            clean = await asyncio.wait_for(process.wait(), _DAEMON_GRACE_S) == 0
        except TimeoutError:
            process.kill()
            await process.wait()
            clean = False
    if not clean:
        release = await asyncio.create_subprocess_exec(
            *CLI,
            "release",
            "--socket",
            str(socket),
            "--cgroup-base",
            CGROUP_BASE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await release.wait()
    return clean


def remove_cgroups() -> str:
    """Remove the demo's cgroups, empty by now; what is in the way, or an empty line."""
    try:
        removed = CgroupDriver.open(base=CGROUP_BASE).remove(CGROUP_BASE)
    except DaemonError as error:
        return str(error)
    return "" if removed.effect in (Effect.DONE, Effect.GONE) else removed.detail


def kill_leftovers(work: Path) -> list[str]:
    """Kill every process whose working directory lies under `work`; their commands. What a tool call started with
    setsid belongs to nobody's process group: the working directory is what still tells whose it is."""
    killed = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(work):
                command = " ".join(process.cmdline())
                process.kill()
                killed.append(command)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or not ours to look at
    return killed


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
