"""Real probes, a real agent: fixtures that load the programs, start processes under them and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from equipoise.ebpf.errors import ProbesUnavailable
from equipoise.ebpf.probes import Probes, Tuning
from equipoise.ebpf.tool_memory import ToolMemory
from equipoise.policies.events import Event, ProcessesGone, ToolCallEnded, ToolCallStarted
from equipoise.policies.model import CgroupId, ToolCallId

SANDBOX = CgroupId(4242)
PYTHON = str(Path(sys.executable).resolve())
"""The interpreter's real binary: a shim would exec once more."""

_PRELUDE = """
import os, subprocess, sys, time
PYTHON = sys.executable
def tool(code, *args): return subprocess.Popen([PYTHON, '-S', '-c', code, *args])
def run(code, *args): return tool(code, *args).wait()
os.read(0, 1)
"""


class Bench:
    """Loaded probes, the agents started under them and every event so far."""

    def __init__(self, tuning: Tuning) -> None:
        self.tools = ToolMemory(Probes.load(tuning))
        self.events: list[Event] = []
        self.beats = True
        """False lets the heartbeat go stale."""
        self._children: list[subprocess.Popen[bytes]] = []

    def agent(
        self, code: str, *, soft_bytes: int = 0, hard_bytes: int = 0, starting: bool = False
    ) -> tuple[subprocess.Popen[bytes], ToolCallId]:
        """Start an agent that runs `code`, with `run` and `tool` to start tool calls; it begins once it is tagged."""
        child = self.waiting(code)
        tag = self.tools.register_agent(
            child.pid, SANDBOX, soft_bytes=soft_bytes, hard_bytes=hard_bytes, starting=starting
        )
        self.release(child)
        return child, tag

    def waiting(self, code: str) -> subprocess.Popen[bytes]:
        """A process that waits to be released before it runs `code`."""
        child = subprocess.Popen(
            [PYTHON, "-S", "-c", _PRELUDE + textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._children.append(child)
        return child

    def release(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        self.tick()
        child.stdin.write(b"x")
        child.stdin.flush()

    def tick(self) -> None:
        if self.beats:
            self.tools.beat()
        self.events += self.tools.drain()

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}; seen {self.events[-6:]}"
            self.tick()
            time.sleep(0.005)

    def settle(self, seconds: float = 0.9) -> None:
        """As long as what was lost is looked for."""
        until = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > until, "time")

    def finish(self, child: subprocess.Popen[bytes], timeout_s: float = 180.0) -> str:
        """Wait for the agent's end and return what it printed."""
        self.wait(lambda: child.poll() is not None, "the agent's end", timeout_s)
        self.tick()
        assert child.stdout is not None
        return child.stdout.read().decode()

    def started(self) -> list[ToolCallStarted]:
        return [event for event in self.events if isinstance(event, ToolCallStarted)]

    def ended(self, tag: int) -> ToolCallEnded | None:
        return next((e for e in self.events if isinstance(e, ToolCallEnded) and e.id == tag), None)

    def gone(self, tag: int) -> bool:
        return any(isinstance(event, ProcessesGone) and event.id == tag for event in self.events)

    def close(self) -> None:
        for tag in self.tools.tags():  # none once a test has closed the probes itself
            self.tools.kill(tag)
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream:
                    stream.close()
        self.tools.close()


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**tuning: Any) -> Bench:
        try:
            bench = Bench(Tuning(**tuning))
        except ProbesUnavailable as error:
            pytest.skip(str(error))
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup of our own with an exact counter: v2, or the v1 hierarchy of a hybrid host."""
    unified, hybrid = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    if hybrid.is_dir():
        root = hybrid
    elif "memory" in (unified / "cgroup.subtree_control").read_text().split():
        root = unified
    else:
        pytest.skip("no memory controller to make a cgroup under")
    group = root / f"eqtest-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make {group}: {error}")
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    for _ in range(100):
        try:
            group.rmdir()
            break
        except OSError:
            time.sleep(0.02)
