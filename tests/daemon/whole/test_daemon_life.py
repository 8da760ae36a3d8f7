"""However the daemon ends, nobody stays stopped or throttled, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Limit
from equipoise.tests.fixtures.running_daemon import (
    CLI,
    Agent,
    RunningDaemon,
    eventually,
    grow,
    process_state,
    with_probes,
)

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
POLICY = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: narrow}
spec:
  tenants: {gold: {weight: 2}, silver: {weight: 1}}
  memory:
    toolPool: 128MiB
    budget: {soft: 48MiB, hard: 64MiB, step: 64MiB, max: 192MiB, bends: false}
    maxWait: 60s
    pressure: {above: 60%, below: 30%, for: 300ms}
    throttle: {cpu: 20%, for: 60s}
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path, policy=POLICY) as running:
        yield running


class Squeeze:
    """Two agents in a pool that is too small: the call of one is throttled, that of the other stands and waits."""

    def __init__(self, daemon: RunningDaemon, *, linger_s: float = 0.0) -> None:
        """`linger_s`: how long the waiting call goes on once it may."""
        self.daemon = daemon
        self.slowed: Agent = daemon.agent("gold", "slowed")
        self.waiting: Agent = daemon.agent("silver", "waiting")
        self.slowed.begin(*grow(50, "time.sleep(120)  # slowed"))
        eventually(lambda: any(c.used_bytes > 50 << 20 for c in daemon.tool_calls("# slowed")))
        self.waiting.begin(*grow(100, f"time.sleep({linger_s}); print('went on')  # waiting"))
        eventually(lambda: daemon.tool_calls("# slowed")[0].phase == "throttled")
        eventually(lambda: any(d.action == "wait for memory" for d in daemon.decisions()))
        self.pid = daemon.tool_calls("# waiting")[0].pid
        slowed = daemon.tool_calls("# slowed")[0]
        self.leaf = f"{daemon.base}/gold/slowed/tools/{slowed.tool_call_id}"
        assert self.stopped() and self.throttled()

    def stopped(self) -> bool:
        return process_state(self.pid) == "T"

    def throttled(self) -> bool:
        driver = CgroupDriver.open(base=self.daemon.base)
        try:
            texts = [driver.limit(self.leaf, limit) for limit in (Limit.CPU_QUOTA, Limit.MEMORY_HIGH)]
        finally:
            driver.close()
        return any(text is not None and not text.startswith(("-1", "max")) for text in texts)

    def free(self) -> bool:
        return not self.stopped() and not self.throttled()


def left_of(daemon: RunningDaemon) -> list[Path]:
    """Directories of the base, in every hierarchy."""
    return [p for p in (*Path("/sys/fs/cgroup").glob(f"*/{daemon.base}"), Path("/sys/fs/cgroup") / daemon.base)
            if p.exists()]  # fmt: skip


def test_the_guardian_frees_everybody_when_the_daemon_is_killed(daemon):
    squeeze = Squeeze(daemon)
    guardian = daemon.guardian()
    daemon.kill()
    eventually(squeeze.free)
    result = squeeze.waiting.result()
    assert (result.returncode, result.stdout) == (0, "grown\nwent on\n")
    eventually(lambda: not guardian.is_running() or guardian.status() == psutil.STATUS_ZOMBIE)


def test_release_frees_everybody_when_daemon_and_guardian_are_killed(daemon):
    squeeze = Squeeze(daemon)
    os.kill(daemon.guardian().pid, signal.SIGKILL)
    daemon.kill()
    time.sleep(1.0)
    assert squeeze.stopped() and squeeze.throttled(), "nobody was there to help"
    released = daemon.cli("release", "--cgroup-base", daemon.base)
    assert released.returncode == 0, released.stderr
    assert released.stdout.startswith("undone from the journal: ")
    assert squeeze.free()
    assert squeeze.waiting.result().stdout == "grown\nwent on\n"
    again = daemon.cli("release", "--cgroup-base", daemon.base)
    assert (again.returncode, again.stdout) == (0, "nothing was held back\n")


def test_release_works_on_cgroups_alone_when_the_journal_is_lost(daemon):
    squeeze = Squeeze(daemon)
    os.kill(daemon.guardian().pid, signal.SIGKILL)
    daemon.kill()
    for file in daemon.state.glob("journal.sqlite*"):
        file.unlink()
    released = daemon.cli("release", "--cgroup-base", daemon.base)
    assert released.returncode == 0 and "found below our cgroup and lifted: " in released.stdout
    assert squeeze.free()


def test_release_asks_a_living_daemon_and_what_was_let_go_is_not_killed_later(tmp_path):
    daemon = RunningDaemon(tmp_path, POLICY.replace("maxWait: 60s", "maxWait: 3s"))
    try:
        daemon.start()
        squeeze = Squeeze(daemon, linger_s=4.0)
        released = daemon.cli("release")
        assert released.returncode == 0 and f"pid {squeeze.pid}" in released.stdout
        assert not squeeze.stopped()
        result = squeeze.waiting.result()
        assert (result.returncode, result.stdout) == (0, "grown\nwent on\n")
        assert not any(d.action.startswith("kill") for d in daemon.decisions())
    finally:
        daemon.close()


def test_a_start_after_a_kill_on_the_same_state_undoes_works_and_clears_away(daemon):
    squeeze = Squeeze(daemon)
    os.kill(daemon.guardian().pid, signal.SIGKILL)
    daemon.kill()
    assert daemon.socket.exists(), "the stale socket of the dead one is taken over"
    daemon.start()
    assert squeeze.free() and "released" in daemon.said()
    assert squeeze.waiting.result().stdout == "grown\nwent on\n"
    squeeze.waiting.leave()
    squeeze.slowed.process.kill()
    agent = daemon.agent("gold", "next")
    assert agent.call(*CLI, "tool", "--", "sh", "-c", "exit 6").returncode == 6
    assert [c.exit_code for c in daemon.tool_calls("exit 6")] == [6]
    agent.leave()


def test_sigterm_lets_go_and_leaves_no_cgroup_socket_or_process(daemon):
    squeeze = Squeeze(daemon)
    assert daemon.process is not None
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    assert daemon.stop() == 0
    assert squeeze.free() and not daemon.socket.exists()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)
    assert squeeze.waiting.result().stdout == "grown\nwent on\n"
    squeeze.waiting.leave()
    assert left_of(daemon), "an agent still lives there"


def test_sigterm_without_agents_leaves_no_cgroup(daemon):
    agent = daemon.agent()
    agent.call("sh", "-c", "true # one call")
    agent.leave()
    daemon.sandboxes.RegisterSandbox(sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="empty"))
    assert left_of(daemon)
    assert daemon.stop() == 0
    assert left_of(daemon) == []


def test_a_guardian_that_dies_is_replaced(daemon):
    first = daemon.guardian().pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: [c for c in psutil.Process(daemon.process.pid).children() if c.pid != first])
    assert daemon.guardian().pid != first and "guardian_died" in daemon.said()


def test_a_sandbox_that_is_killed_under_us_is_an_end_like_any_other(daemon):
    agent = daemon.agent("gold", "struck")
    agent.begin("sleep", "60")
    eventually(lambda: daemon.tool_calls("sleep 60"))
    driver = CgroupDriver.open(base=daemon.base)
    driver.kill(f"{daemon.base}/gold/struck")
    driver.close()
    eventually(lambda: not daemon.watch().sandboxes)
    agent.process.communicate()
    [call] = daemon.tool_calls("sleep 60")
    assert call.phase == "ended" and call.signal == 9
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}/gold/struck"))
    assert daemon.status().failed_action_count == 0
    assert daemon.agent("gold", "struck").call("echo", "again").stdout == "again\n"


def test_an_adopted_cgroup_that_vanishes_can_be_removed_and_taken_up_again(daemon):
    driver = CgroupDriver.open(base=f"{daemon.base}-foreign")
    path = driver.base
    request = sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="box", cgroup_path=path)
    for _ in range(2):
        for hierarchy in driver.layout.hierarchies:
            (hierarchy.mount / path).mkdir()
        registered = daemon.sandboxes.RegisterSandbox(request)
        assert registered.cgroup_path == path
        time.sleep(0.3)  # it is sampled
        driver.remove(path)
        time.sleep(0.3)
        daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="gold", name="box"))
        assert not daemon.watch().sandboxes
    driver.close()
    assert "Traceback" not in daemon.said() and "turn_failed" not in daemon.said()


def test_without_probes_a_call_is_still_stopped_killed_and_freed(tmp_path):
    daemon = RunningDaemon(tmp_path)
    try:
        daemon.start("--no-ebpf")
        assert any(line.startswith("no eBPF (switched off") for line in daemon.status().lacks)
        agent = daemon.agent()
        tool = (*CLI, "tool", "--")
        granted = agent.call(*tool, *grow(100, "'granted'"))
        assert granted.returncode == 0 and "granted up to" in granted.stderr
        killed = agent.call(*tool, *grow(4000, "'runaway'", pause_s=0.02))
        assert killed.returncode == 137 and "ended this tool call" in killed.stderr
        assert agent.call("echo", "alive").stdout == "alive\n"
        failed = agent.call(*tool, "sh", "-c", "exit 9 # code")
        assert failed.returncode == 9
        calls = {c.command.rsplit("'", 2)[-2] if "'" in c.command else c.command: c for c in daemon.tool_calls()}
        assert [c.source for c in calls.values()] == ["wrapper"] * 3
        assert 100 << 20 < calls["granted"].peak_bytes < 130 << 20
        assert calls["runaway"].signal == 9 and calls["runaway"].phase == "ended"
        assert [c.exit_code for c in daemon.tool_calls("# code")] == [9]
        told = daemon.decisions(calls["runaway"].tool_call_id)
        assert told[0].action == "kill the tool call" and all(d.action.startswith("grant ") for d in told[1:])
        assert {d.tier for d in told} == {"user-space poll", "cgroup.kill"}
    finally:
        daemon.close()
