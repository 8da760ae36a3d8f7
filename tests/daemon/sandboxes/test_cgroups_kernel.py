"""The driver on this machine's cgroups, of whichever layout."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from equipoise.daemon.errors import CgroupError
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Effect, LayoutKind, Limit
from equipoise.daemon.sandboxes.cgroups.layout import current_path
from equipoise.policies.model import MIB, TenantId, ToolCallId

from ..conftest import Spawn, eventually

pytestmark = pytest.mark.kernel

GOLD = TenantId("gold")
GROW = "import sys; b = b'x' * (int(sys.argv[1]) << 20); print('grown', flush=True); sys.stdin.read()"
SPIN = "print('on', flush=True)\nwhile True: pass"


def made(driver: CgroupDriver, call: int = 1) -> tuple[str, str]:
    """A sandbox and a tool leaf in it."""
    sandbox = driver.create_sandbox(GOLD, "ada")
    return sandbox.path, driver.create_tool_leaf(sandbox.path, ToolCallId(call))


def test_a_process_is_put_into_every_hierarchy_and_its_children_with_it(driver: CgroupDriver, spawn: Spawn) -> None:
    sandbox, leaf = made(driver)
    child = spawn(
        "import subprocess, sys; sys.stdin.readline(); p = subprocess.Popen(['sleep', '600']);"
        "print(p.pid, flush=True); p.wait()"
    )
    assert driver.attach(child.pid, leaf).done
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()
    grandchild = int(child.stdout.readline())
    for hierarchy in driver.layout.hierarchies:
        assert current_path(hierarchy, grandchild) == leaf
    assert driver.processes(sandbox) == tuple(sorted((child.pid, grandchild)))
    assert driver.cgroup_id(leaf) == (driver.layout.unified.mount / leaf).stat().st_ino
    assert driver.cgroup_of(child.pid) == leaf


def test_usage_and_peak_follow_what_a_process_allocates(driver: CgroupDriver, spawn: Spawn) -> None:
    sandbox, leaf = made(driver)
    child = spawn("import sys; sys.stdin.readline(); " + GROW.replace("import sys; ", ""), "64")
    driver.attach(child.pid, leaf)
    before = driver.memory_usage(sandbox)
    assert before is not None and child.stdin is not None and child.stdout is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"grown\n"
    used, resident = driver.memory_usage(sandbox), driver.memory_resident(leaf)
    assert used is not None and 64 * MIB <= used - before <= 72 * MIB
    assert resident is not None and resident >= 64 * MIB, "a sandbox counts its leaves, a leaf itself"
    child.kill()
    child.wait(5)
    assert eventually(lambda: (driver.memory_usage(leaf) or 0) < 16 * MIB)
    assert (driver.memory_peak(sandbox) or 0) >= 64 * MIB


def test_a_frozen_tool_stands_still_and_its_agent_does_not(driver: CgroupDriver, spawn: Spawn) -> None:
    sandbox, leaf = made(driver)
    tool, agent = spawn(SPIN), spawn(SPIN)
    driver.attach(tool.pid, leaf)
    driver.attach(agent.pid, f"{sandbox}/runtime")
    assert driver.freeze(leaf).done
    assert eventually(lambda: driver.frozen(leaf) is True)
    still, running = driver.cpu_ns(leaf), driver.cpu_ns(f"{sandbox}/runtime")
    time.sleep(0.2)
    assert eventually(lambda: (driver.cpu_ns(f"{sandbox}/runtime") or 0) > (running or 0))
    assert driver.cpu_ns(leaf) == still
    assert driver.thaw(leaf).done
    assert eventually(lambda: (driver.cpu_ns(leaf) or 0) > (still or 0))


def test_a_kill_takes_the_leaf_alone_frozen_stopped_or_daemonised(driver: CgroupDriver, spawn: Spawn) -> None:
    sandbox, leaf = made(driver)
    agent = spawn()
    driver.attach(agent.pid, f"{sandbox}/runtime")
    escaping = spawn(
        "import os, sys, time; sys.stdin.readline()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(600)\n"
        "    os._exit(0)\n"
        "time.sleep(600)"
    )
    driver.attach(escaping.pid, leaf)
    assert escaping.stdin is not None and escaping.stdout is not None
    escaping.stdin.write(b"go\n")
    escaping.stdin.flush()
    escapee = int(escaping.stdout.readline())
    os.kill(escapee, signal.SIGSTOP)
    driver.freeze(leaf)
    assert eventually(lambda: driver.frozen(leaf) is True)
    result = driver.kill(leaf)
    assert result.done and result.tier == "cgroup.kill" and result.count >= 2
    assert eventually(lambda: driver.populated(leaf) is False)
    assert escaping.wait(5) == -signal.SIGKILL and agent.poll() is None


def test_limits_are_set_read_back_and_lifted(driver: CgroupDriver) -> None:
    _, leaf = made(driver)
    before = {limit: driver.limit(leaf, limit) for limit in Limit}
    assert driver.set_memory_max(leaf, 64 * MIB).done
    assert driver.limit(leaf, Limit.MEMORY_MAX) == str(64 * MIB)
    assert driver.set_cpu_quota(leaf, 0.5).done
    high = driver.set_memory_high(leaf, 32 * MIB)
    assert high.effect is (Effect.DONE if driver.layout.kind is LayoutKind.V2 else Effect.UNAVAILABLE)
    assert driver.restricted(leaf) >= 2
    driver.lift(leaf)
    assert {limit: driver.limit(leaf, limit) for limit in Limit} == before and driver.restricted(leaf) == 0


def test_a_value_the_kernel_refuses_is_a_failure_and_not_swallowed(driver: CgroupDriver) -> None:
    _, leaf = made(driver)
    result = driver.restore(leaf, Limit.CPU_QUOTA, "nonsense")
    assert result.effect is Effect.FAILED and "Invalid argument" in result.detail and "nonsense" in result.detail


def test_a_cpu_quota_slows_a_spinning_tool_down(driver: CgroupDriver, spawn: Spawn) -> None:
    _, leaf = made(driver)
    tool = spawn(SPIN)
    driver.attach(tool.pid, leaf)
    assert driver.set_cpu_quota(leaf, 0.1).done
    time.sleep(0.2)
    begun_ns, begun = time.monotonic_ns(), driver.cpu_ns(leaf) or 0
    time.sleep(1.0)
    share = ((driver.cpu_ns(leaf) or 0) - begun) / (time.monotonic_ns() - begun_ns)
    assert share < 0.25, "a tenth of one CPU was asked for"


def test_a_cgroup_that_vanishes_under_a_kept_descriptor_is_gone_and_then_new(driver: CgroupDriver) -> None:
    _, leaf = made(driver)
    assert driver.memory_usage(leaf) == 0 and driver.memory_peak(leaf) == 0
    assert driver.remove(leaf).done
    assert driver.memory_usage(leaf) is None and driver.memory_peak(leaf) is None and driver.cpu_ns(leaf) is None
    assert driver.freeze(leaf).effect is driver.kill(leaf).effect is Effect.GONE
    assert made(driver)[1] == leaf
    assert driver.memory_usage(leaf) is not None


def test_a_process_that_ended_cannot_be_attached_and_that_is_an_outcome(driver: CgroupDriver, spawn: Spawn) -> None:
    _, leaf = made(driver)
    child = spawn("pass")
    child.wait(5)
    assert driver.attach(child.pid, leaf).effect is Effect.GONE


def test_a_process_is_never_left_in_half_of_a_sandbox(driver: CgroupDriver, spawn: Spawn) -> None:
    if driver.layout.kind is LayoutKind.V2:
        pytest.skip("one hierarchy has no halves")
    _, leaf = made(driver)
    child = spawn()
    before = [current_path(h, child.pid) for h in driver.layout.hierarchies]
    (driver.layout.unified.mount / leaf).rmdir()  # the last hierarchy: the others have taken the process by then
    assert driver.attach(child.pid, leaf).effect is Effect.GONE
    assert [current_path(h, child.pid) for h in driver.layout.hierarchies] == before


def test_a_sandbox_in_use_is_not_taken_apart(driver: CgroupDriver, spawn: Spawn) -> None:
    sandbox, leaf = made(driver)
    child = spawn()
    driver.attach(child.pid, leaf)
    result = driver.remove(sandbox, patience_s=0)
    assert result.effect is Effect.FAILED and str(child.pid) in result.detail
    assert driver.below(sandbox) == (sandbox, f"{sandbox}/runtime", f"{sandbox}/tools", leaf)
    driver.kill(sandbox)
    assert driver.remove(sandbox, patience_s=3).done, "killed processes are waited for"
    for hierarchy in driver.layout.hierarchies:
        assert not (hierarchy.mount / sandbox).exists()


def test_reclaim_answers_what_came_of_it(driver: CgroupDriver) -> None:
    _, leaf = made(driver)
    effect = driver.reclaim(leaf, 64 * MIB).effect
    # EAGAIN: there is nothing to reclaim in an empty cgroup.
    assert effect is (Effect.PARTIAL if driver.layout.kind is LayoutKind.V2 else Effect.UNAVAILABLE)


def test_pressure_of_a_cgroup_is_read_where_the_kernel_counts_it(driver: CgroupDriver) -> None:
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no PSI: boot with psi=1")
    sandbox, _ = made(driver)
    stall = driver.pressure(sandbox)
    assert stall is not None and stall.some_ratio == 0.0 and stall.some_total_us == 0


def test_a_cgroup_in_use_of_somebody_else_can_be_adopted_and_measured(driver: CgroupDriver, spawn: Spawn) -> None:
    theirs, leaf = made(driver)
    child = spawn()
    driver.attach(child.pid, leaf)
    stranger = CgroupDriver(driver.layout, "eqtest-stranger")
    adopted = stranger.adopt(theirs)
    assert not adopted.own and adopted.cgroup_id == driver.cgroup_id(theirs)
    assert stranger.processes(adopted.path) == (child.pid,)
    assert stranger.memory_usage(adopted.path) is not None
    with pytest.raises(CgroupError, match="only cgroups that we made are removed"):
        stranger.remove(adopted.path)
    stranger.close()


def test_without_permission_the_error_is_one_line_with_the_remedy(spawn: Spawn) -> None:
    if os.geteuid() != 0:
        pytest.skip("gives root up in a child, so it needs it")
    base = f"eqtest-{os.getpid()}-nobody"
    child = spawn(
        "import os, sys\n"
        "from equipoise.daemon.sandboxes.cgroups import CgroupDriver\n"
        "from equipoise.daemon.errors import CgroupError\n"
        "driver = CgroupDriver.open(base=sys.argv[1])\n"
        "os.setuid(65534)\n"
        "try: driver.prepare()\n"
        "except CgroupError as error: print(error, flush=True)",
        base,
    )
    assert child.stdout is not None
    said = child.stdout.read().decode()
    assert said.count("\n") == 1 and base in said and "Permission denied: run as root" in said
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{base}")), "nothing half-made is left"
