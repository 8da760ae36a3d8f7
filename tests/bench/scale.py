"""What many sandboxes cost the daemon, and how many calls a second it follows: `make bench-scale`.

200 agents that wait, 150 with 1.5 calls a second in all, 200 with 17 a second (1,000 a minute), and two shell loops
that exec as fast as they can. The daemon's CPU time is that of its process; every call is compared with the truth.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.observe.journal import JournalReader
from equipoise.daemon.sandboxes.processes import boot_id
from equipoise.tests.fixtures.many_agents import ManyAgents, Orders
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually

from .report import Row, publish

IDLE_S = 10.0
BUSY_S = 30.0
LOOP_S = 10.0


class Meter:
    """CPU seconds of the daemon since it was made."""

    def __init__(self, daemon: RunningDaemon) -> None:
        assert daemon.process is not None
        self._process = psutil.Process(daemon.process.pid)
        self._began_s, self._cpu_s = time.monotonic(), self._spent()

    def share(self) -> float:
        """Percent of a core."""
        return 100 * self.cpu_s() / (time.monotonic() - self._began_s)

    def cpu_s(self) -> float:
        return self._spent() - self._cpu_s

    def _spent(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def working(folder: Path, agents: int, calls_per_s: float) -> list[Row]:
    daemon = RunningDaemon(folder)
    many = None
    try:
        daemon.start()
        many = ManyAgents(daemon, agents)
        time.sleep(2)
        meter = Meter(daemon)
        time.sleep(IDLE_S)
        idle = meter.share()
        meter = Meter(daemon)
        many.run(Orders(seconds=BUSY_S, period_s=agents / calls_per_s), within_s=3 * BUSY_S)
        share = meter.share()
        eventually(lambda: not [call for call in daemon.tool_calls() if not call.end_ns])
        lost = sum(daemon.status().losses.values())
        many.leave()
        eventually(lambda: not daemon.watch().sandboxes, within_s=30)
        found = many.compare()
        wrong = len(found.lost) + len(found.double) + len(found.phantom) + len(found.open) + len(found.wrong)
        name = f"{agents} sandboxes, {calls_per_s:g} calls a second"
        note = f"{found.true} calls of 20 to 200 ms in {BUSY_S:g} s"
        return [
            Row(f"{agents} sandboxes that wait: daemon's CPU", round(idle, 2), "% core", 2.0),
            Row(f"{name}: daemon's CPU", round(share, 2), "% core", 2.0, note=note),
            Row(f"{name}: calls lost, double, invented or wrong", wrong, "calls", 0, note=note),
            Row(f"{name}: events lost", lost, "events", 0, note=note),
        ]
    finally:
        if many is not None:
            many.close()
        daemon.close()


def loops(folder: Path, count: int) -> list[Row]:
    """Shells that run the shortest program there is, again and again."""
    daemon = RunningDaemon(folder)
    shells: list[subprocess.Popen[str]] = []
    go, stop = folder / "go", folder / "stop"
    code = (
        f"while [ ! -e {go} ]; do sleep 0.1; done; n=0; while [ ! -e {stop} ]; do /bin/true; n=$((n+1)); done; echo $n"
    )
    try:
        daemon.start()
        for number in range(count):
            shell = subprocess.Popen(["sh", "-c", code], stdout=subprocess.PIPE, text=True)
            shells.append(shell)
            request = sandbox_pb2.RegisterSandboxRequest(
                tenant_id="gold", name=f"loop-{number}", pid=shell.pid, direct=True
            )
            daemon.sandboxes.RegisterSandbox(request, timeout=20)
        meter = Meter(daemon)
        go.touch()
        time.sleep(LOOP_S)
        share = meter.share()
        stop.touch()
        execs = sum(int(shell.communicate(timeout=60)[0]) for shell in shells)
        eventually(lambda: not daemon.watch().sandboxes, within_s=60)
        losses = dict(daemon.status().losses)
        daemon.stop()
        with JournalReader(daemon.state / "journal.sqlite") as reader:
            books = sum(call.command == "/bin/true" for call in reader.newest_calls(boot_id(), 1_000_000))
        note = f"daemon {share:.0f} % of a core meanwhile; lost: {losses or 'nothing'}"
        return [
            Row(f"{count} shell loops: calls a second", round(execs / LOOP_S), "1/s", None, "higher", note=note),
            Row(f"{count} shell loops: calls unseen", execs - books, "calls", 0, note=note),
        ]
    finally:
        for shell in shells:
            shell.kill()
            shell.communicate()
        daemon.close()


def main() -> int:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="equipoise-scale-") as folder:
        for number, bench in enumerate((
            lambda path: working(path, 150, 1.5),
            lambda path: working(path, 200, 1000 / 60),
            lambda path: loops(path, 2),
        )):  # fmt: skip
            path = Path(folder) / str(number)
            path.mkdir()
            rows += bench(path)
    publish("scale", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
