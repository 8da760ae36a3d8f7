"""What the probes cost and how sharp they are: `make bench-probes`.

Page faults with and without probes are measured in turn, in one process, so that a busy neighbour hits both alike.
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from equipoise.ebpf.errors import ProbesUnavailable
from equipoise.ebpf.libbpf import BpfObject, BpfProgram
from equipoise.ebpf.probes import Probes, Tuning, checked_object
from equipoise.ebpf.tool_memory import ToolMemory
from equipoise.policies.events import BudgetLevel, BudgetReached, ToolCallEnded, ToolCallStarted
from equipoise.policies.model import CgroupId, ToolCallId

from .report import Baseline, Row, of_runs, publish

MIB = 1 << 20
PAGE = mmap.PAGESIZE
FAULTS = 16_384
SANDBOX = CgroupId(1)
PYTHON = str(Path(sys.executable).resolve())

GROW = "keep = [bytearray(1 << 16) for _ in range(100000)]"


def fault_ns(repeats: int = 3) -> float:
    """One anonymous page fault of this process without huge pages: mean over FAULTS of them, best of `repeats`."""
    best = float("inf")
    ones = b"\1" * FAULTS
    for _ in range(repeats):
        area = mmap.mmap(-1, FAULTS * PAGE)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        start = time.perf_counter_ns()
        area[::PAGE] = ones
        best = min(best, (time.perf_counter_ns() - start) / FAULTS)
        area.close()
    return best


def fault_cost(rounds: int = 25) -> list[Row]:
    """Nanoseconds per page fault: no probes, probes that do not concern this process, this process counted."""
    without, missed, counted = [], [], []
    fault_ns()
    for _ in range(rounds):
        without.append(fault_ns())
        tools = ToolMemory(Probes.load(Tuning(tool_slots=16)))
        try:
            missed.append(fault_ns())
            tools.begin_tool(os.getpid(), SANDBOX)
            counted.append(fault_ns())
        finally:
            tools.close()
    base = median(without)
    added = [m - w for m, w in zip(missed, without, strict=True)]
    of_tool = [c - w for c, w in zip(counted, without, strict=True)]
    note = f"{rounds} rounds in turn, each the best of 3 times {FAULTS} faults"
    return [
        of_runs(
            "page fault of a process that is not followed, against no probes",
            [m / w for m, w in zip(missed, without, strict=True)],
            "ratio",
            1.05,
            baseline=Baseline("ns without probes", base),
            note=note,
        ),
        of_runs("the same, added", added, "ns", 100, baseline=Baseline("ns without probes", base), note=note),
        of_runs(
            "page fault of a tool call, against no probes",
            [c / w for c, w in zip(counted, without, strict=True)],
            "ratio",
            1.25,
            baseline=Baseline("ns without probes", base),
            note=f"{note}; counted exactly, an event every 4 MiB",
        ),
        of_runs("the same, added", of_tool, "ns", None, baseline=Baseline("ns without probes", base), note=note),
    ]


def run_time_ns(program: BpfProgram, rounds: int = 20) -> list[float]:
    """The kernel's own measurement of a program while this process faults (kernel.bpf_stats_enabled must be on)."""

    def counters() -> tuple[int, int]:
        text = Path(f"/proc/self/fdinfo/{program.fd}").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return int(fields["run_time_ns"]), int(fields["run_cnt"])

    runs = []
    for _ in range(rounds):
        time_before, count_before = counters()
        fault_ns(1)
        time_after, count_after = counters()
        runs.append((time_after - time_before) / (count_after - count_before))
    return runs


def program_time() -> list[Row]:
    """rss_stat's own time, less that of an empty program at the same tracepoint (the clock reads around it)."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    empty = BpfObject(checked_object("capabilities"))
    for name, program in empty.programs.items():
        program.set_autoload(name == "rss_stat")
    empty.load()
    tools = ToolMemory(probes := Probes.load(Tuning(tool_slots=16)))
    try:
        link = empty.programs["rss_stat"].attach()
        switch.write_text("1")
        nothing = median(run_time_ns(empty.programs["rss_stat"]))
        link.destroy()
        missed = run_time_ns(probes.object.programs["on_rss_stat"])
        tools.begin_tool(os.getpid(), SANDBOX)
        counted = run_time_ns(probes.object.programs["on_rss_stat"])
    finally:
        switch.write_text(before)
        tools.close()
        empty.close()
    note = "measured by the kernel, less an empty program"
    baseline = Baseline("empty program, ns", nothing)
    return [
        of_runs("rss_stat program, process not followed", [m - nothing for m in missed], "ns", 70, baseline, note),
        of_runs("rss_stat program, tool call counted", [c - nothing for c in counted], "ns", 300, baseline, note),
    ]


class Agent:
    """A registered process that runs one tool call."""

    def __init__(self, tools: ToolMemory, code: str, *, soft_bytes: int = 0, hard_bytes: int = 0) -> None:
        self.tools = tools
        starter = f"import os, subprocess, sys; os.read(0, 1); subprocess.run([{PYTHON!r}, '-S', '-c', {code!r}])"
        self.process = subprocess.Popen([PYTHON, "-S", "-c", starter], stdin=subprocess.PIPE)
        self.tag = tools.register_agent(self.process.pid, SANDBOX, soft_bytes=soft_bytes, hard_bytes=hard_bytes)
        tools.beat()
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")
        self.process.stdin.flush()

    def end(self) -> None:
        for tag in self.tools.tags():
            self.tools.kill(tag)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


def overshoot_bytes(tools: ToolMemory, stop_from_user_space: bool, budget: int = 64 * MIB) -> float:
    """How far above its budget a tool call got: stopped in the kernel, or by SIGSTOP after reading the event."""
    which = {"soft_bytes": budget} if stop_from_user_space else {"hard_bytes": budget}
    agent = Agent(tools, GROW, **which)
    try:
        call: ToolCallId | None = None
        wanted = BudgetLevel.SOFT if stop_from_user_space else BudgetLevel.HARD
        while call is None:
            for event in tools.drain():
                if isinstance(event, BudgetReached) and event.level is wanted:
                    call = event.id
        if stop_from_user_space:
            tools.stop(call)
        time.sleep(0.05)
        usage = tools.usage(call)
        assert usage is not None
        return usage.peak_bytes - budget
    finally:
        agent.end()
        tools.drain()


def sharpness(rounds: int = 12) -> list[Row]:
    tools = ToolMemory(Probes.load())
    try:
        kernel = [overshoot_bytes(tools, False) for _ in range(rounds)]
        user = [overshoot_bytes(tools, True) for _ in range(rounds)]
    finally:
        tools.close()
    note = f"a Python process that allocates as fast as it can, budget 64 MiB, {rounds} runs; worst counts"
    baseline = Baseline("KiB when user space stops it, worst", max(user) / 1024)
    runs = tuple(run / 1024 for run in kernel)
    return [Row("overshoot at the hard budget", max(runs), "KiB", 1024, baseline=baseline, runs=runs, note=note)]


def accuracy() -> list[Row]:
    """Peak of one tool call against VmHWM of the same process."""
    tools = ToolMemory(Probes.load())
    rows = []
    try:
        for size in (50, 200, 800):
            runs = []
            for _ in range(3):
                reader, writer = os.pipe()
                os.set_inheritable(writer, True)
                code = (
                    f"import os; x = bytearray({size} << 20); "
                    f"os.write({writer}, open('/proc/self/status').read().split('VmHWM:')[1].split()[0].encode())"
                )
                starter = (
                    "import os, subprocess; os.read(0, 1); "
                    f"subprocess.run([{PYTHON!r}, '-S', '-c', {code!r}], close_fds=False)"
                )
                process = subprocess.Popen([PYTHON, "-S", "-c", starter], stdin=subprocess.PIPE, close_fds=False)
                tools.register_agent(process.pid, SANDBOX)
                process.communicate(b"x")
                os.close(writer)
                truth = int(os.read(reader, 64)) * 1024
                os.close(reader)
                (ended,) = (event for event in tools.drain() if isinstance(event, ToolCallEnded))
                assert ended.peak_bytes is not None
                runs.append(abs(ended.peak_bytes - truth) / truth)
            rows.append(of_runs(f"peak of a {size} MiB tool call, error against VmHWM", runs, "ratio", 0.05))
    finally:
        tools.close()
    return rows


def latency(rounds: int = 50) -> list[Row]:
    """From exec in the kernel to the event in Python, as the daemon waits for it."""
    tools = ToolMemory(Probes.load())
    poll = select.epoll()
    poll.register(tools.fileno(), select.EPOLLIN)
    runs: list[float] = []
    try:
        for _ in range(rounds):
            agent = Agent(tools, "pass")
            before = len(runs)
            while len(runs) == before:
                poll.poll(1.0)
                now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                runs += [(now_ns - e.at_ns) / 1000 for e in tools.drain() if isinstance(e, ToolCallStarted)]
            agent.process.wait()
            agent.end()
            tools.drain()
    finally:
        poll.close()
        tools.close()
    return [of_runs("exec to event in Python", runs, "us", 2000, note=f"{rounds} runs; worst {max(runs):.0f} us")]


def start() -> list[Row]:
    def once() -> float:
        begun = time.perf_counter()
        ToolMemory(Probes.load()).close()
        return time.perf_counter() - begun

    return [of_runs("load, attach, detach", [once() * 1000 for _ in range(8)], "ms", 500)]


FAMILIES: tuple[Callable[[], list[Row]], ...] = (start, fault_cost, program_time, accuracy, sharpness, latency)


def main() -> int:
    try:
        rows = [row for family in FAMILIES for row in family()]
    except ProbesUnavailable as error:
        print(f"probes: not run: {error}", file=sys.stderr)
        return 0
    publish("probes", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
