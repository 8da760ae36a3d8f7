"""The project's cgroup driver against the controllers of a real v2 hierarchy, delegated by systemd."""

import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from equipoise.daemon.sandboxes.cgroups import Effect, LayoutKind
from equipoise.tests.vm.guest.loads import (
    MIB,
    field,
    grow,
    has_grown,
    read,
    share_of_one_cpu,
    spin,
    start_in,
    wait_until,
    write,
)

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def zram_swap() -> Iterator[None]:
    Path("/sys/block/zram0/disksize").write_text("256M")
    subprocess.run(["mkswap", "-q", "/dev/zram0"], check=True, capture_output=True)
    subprocess.run(["swapon", "/dev/zram0"], check=True)
    yield
    subprocess.run(["swapoff", "/dev/zram0"], check=True)
    Path("/sys/block/zram0/reset").write_text("1")


# -- delegation and inner nodes


def test_the_driver_finds_a_v2_layout_and_takes_the_subtree_that_systemd_delegated(driver):
    assert driver.layout.kind is LayoutKind.V2
    assert driver.base == "system.slice/vm-command.service"
    assert driver.cgroup_of(os.getpid()).startswith(driver.base + "/"), "it made room by moving itself to a leaf"
    assert {"cpu", "memory", "pids"} <= set(read(driver, driver.base, "cgroup.subtree_control").split())


def test_a_leaf_of_a_tool_call_has_the_controllers(driver, leaf):
    assert {"cpu", "memory", "pids"} <= set(read(driver, leaf, "cgroup.controllers").split())


def test_an_inner_node_refuses_processes_with_ebusy_and_the_process_stays_where_it_was(driver, sandbox):
    before = driver.cgroup_of(os.getpid())
    refused = driver.attach(os.getpid(), sandbox.path)
    assert refused.effect is Effect.FAILED
    assert "busy" in refused.detail
    assert driver.cgroup_of(os.getpid()) == before


def test_a_cgroup_that_holds_a_process_refuses_to_hand_controllers_down(driver, leaf):
    start_in(driver, leaf, "sys.stdin.read()")
    with pytest.raises(OSError, match="busy"):
        write(driver, leaf, "cgroup.subtree_control", "+memory")


def test_a_subtree_given_to_another_user_lets_it_make_cgroups_but_not_raise_its_own_limit(driver, leaf):
    directory = driver.unified_directory(leaf)
    nobody = 65534
    os.chown(directory, nobody, nobody)
    script = f"mkdir {directory}/mine && ! {{ echo max > {directory}/memory.max; }} 2>/dev/null"
    subprocess.run(["setpriv", f"--reuid={nobody}", "--clear-groups", "sh", "-c", script], check=True)
    assert (directory / "mine").is_dir()


# -- memory


def test_memory_high_slows_a_tool_call_down_and_lifting_it_lets_it_finish(driver, leaf):
    driver.set_memory_high(leaf, 24 * MIB)
    child = grow(driver, leaf, 96)
    wait_until(lambda: driver.events(leaf).high_count > 0, "memory.events high")
    wait_until(lambda: driver.memory_usage(leaf) > 24 * MIB, "usage at the limit")
    assert driver.memory_usage(leaf) < 64 * MIB, "it is held back, not stopped and not killed"
    wait_until(lambda: driver.pressure(leaf).some_total_us > 0, "memory pressure")
    assert driver.set_memory_high(leaf, None).done
    assert has_grown(child)
    assert driver.memory_usage(leaf) > 96 * MIB
    assert driver.memory_peak(leaf) >= driver.memory_usage(leaf) - MIB
    assert driver.events(leaf).oom_kill_count == 0


def test_memory_max_kills_the_tool_call_alone(driver, sandbox, leaf):
    bystander = grow(driver, sandbox.runtime, 16)
    assert has_grown(bystander)
    assert driver.set_memory_max(leaf, 32 * MIB).done
    child = grow(driver, leaf, 128)
    assert not has_grown(child)
    assert child.wait() == -9
    events = driver.events(leaf)
    assert (events.oom_kill_count, events.max_count > 0) == (1, True)
    assert driver.memory_peak(leaf) <= 32 * MIB
    assert bystander.poll() is None


def test_reclaim_without_swap_says_that_less_could_be_had(driver, leaf):
    write(driver, leaf, "memory.swap.max", "0")
    assert has_grown(grow(driver, leaf, 48))
    before = driver.memory_usage(leaf)
    assert driver.reclaim(leaf, 32 * MIB).effect is Effect.PARTIAL
    assert driver.memory_usage(leaf) > before - 16 * MIB


def test_reclaim_moves_memory_to_zram(driver, leaf, zram_swap):
    assert has_grown(grow(driver, leaf, 64))
    before = driver.memory_usage(leaf)
    assert driver.reclaim(leaf, 32 * MIB).effect is Effect.DONE
    assert driver.memory_usage(leaf) < before - 24 * MIB
    assert int(read(driver, leaf, "memory.swap.current")) > 24 * MIB


def test_with_swap_memory_high_makes_room_and_the_tool_call_finishes(driver, leaf, zram_swap):
    driver.set_memory_high(leaf, 32 * MIB)
    assert has_grown(grow(driver, leaf, 96))
    assert driver.events(leaf).high_count > 0
    assert int(read(driver, leaf, "memory.swap.current")) > 32 * MIB
    assert driver.memory_usage(leaf) < 64 * MIB


def test_a_pressure_trigger_wakes_a_poller_when_a_tool_call_stalls(driver, leaf):
    descriptor = os.open(driver.unified_directory(leaf) / "memory.pressure", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, b"some 50000 1000000\0")  # 50 ms of stall within one second
        poller = select.poll()
        poller.register(descriptor, select.POLLPRI)
        assert poller.poll(0) == []
        driver.set_memory_high(leaf, 16 * MIB)
        grow(driver, leaf, 96)
        ((_, event),) = poller.poll(60_000)
        assert event & select.POLLPRI and not event & select.POLLERR
    finally:
        os.close(descriptor)
        driver.set_memory_high(leaf, None)


# -- cpu and pids


def test_cpu_weight_divides_one_cpu_300_to_100(driver, make_sandbox):
    heavy, light = make_sandbox(), make_sandbox()
    write(driver, heavy.path, "cpu.weight", "300")
    ratio = share_of_one_cpu(driver, heavy.runtime, light.runtime)
    assert 2.2 < ratio < 3.8


def test_a_cpu_quota_throttles(driver, leaf):
    assert driver.set_cpu_quota(leaf, 0.2).done
    assert read(driver, leaf, "cpu.max") == "20000 100000\n"
    spin(driver, leaf)
    wait_until(lambda: field(read(driver, leaf, "cpu.stat"), "nr_throttled") >= 3, "three throttled periods")


def test_pids_max_refuses_the_fork_and_counts_it(driver, leaf):
    write(driver, leaf, "pids.max", "2")
    child = start_in(
        driver,
        leaf,
        "import os\ntry:\n  [os.fork() or sys.stdin.read() for _ in range(3)]\nexcept BlockingIOError: print('no')",
    )
    wait_until(lambda: field(read(driver, leaf, "pids.events"), "max") > 0, "pids.events max")
    assert len(driver.processes(leaf)) == 2
    driver.kill(leaf)
    assert child.wait() == -9


# -- freeze and kill


def test_a_frozen_tool_call_uses_no_cpu_until_it_is_thawed(driver, leaf):
    spin(driver, leaf)
    wait_until(lambda: driver.cpu_ns(leaf) > 100_000_000, "CPU time before the freeze")
    assert driver.freeze(leaf).done
    wait_until(lambda: driver.frozen(leaf), "frozen")
    stopped_at = driver.cpu_ns(leaf)
    with pytest.raises(AssertionError):
        wait_until(lambda: driver.cpu_ns(leaf) > stopped_at + 10_000_000, "no CPU time", patience_s=2)
    assert driver.thaw(leaf).done
    wait_until(lambda: driver.cpu_ns(leaf) > stopped_at + 100_000_000, "CPU time after the thaw")


def test_killing_reaches_a_frozen_tree_and_what_escaped_its_session(driver, leaf):
    code = "import os, time\nfor _ in range(3):\n  if os.fork() == 0: os.setsid(); time.sleep(999)\ntime.sleep(999)"
    child = start_in(driver, leaf, code)
    wait_until(lambda: len(driver.processes(leaf)) == 4, "four processes")
    driver.freeze(leaf)
    wait_until(lambda: driver.frozen(leaf), "frozen")
    assert driver.kill(leaf).count == 4
    assert child.wait() == -9
    wait_until(lambda: driver.populated(leaf) is False, "an empty cgroup")


def test_a_removed_cgroup_is_an_outcome_and_no_error(driver, leaf):
    assert driver.remove(leaf).done
    assert driver.memory_usage(leaf) is None
    assert driver.freeze(leaf).effect is Effect.GONE
    assert driver.set_memory_high(leaf, MIB).effect is Effect.GONE
    assert driver.kill(leaf).effect is Effect.GONE
