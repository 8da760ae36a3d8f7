"""Whatever ends the daemon, nothing stays stopped, frozen or throttled."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from equipoise.daemon.enforce import freeze, stop
from equipoise.daemon.enforce.guardian import Guardian, release
from equipoise.daemon.observe.journal import Journal, JournalReader
from equipoise.daemon.observe.journal.hold import Hold, HoldCause, HoldKind
from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import CgroupDriver, Limit
from equipoise.daemon.sandboxes.processes import ProcessRef, boot_id
from equipoise.policies.model import TenantId, ToolCallId

from ..conftest import Spawn, eventually

SOON_NS = 60_000_000_000

# A daemon in small: its own journal, guardian and actuator; it freezes one tool call, throttles it, stops another's
# process by signal, and notes that the kernel may stop what is in the sandbox.
DAEMON = """
import sys, time
from pathlib import Path
from equipoise.daemon.enforce.actuator import Actuator
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.daemon.enforce.guardian import Guardian
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.sandboxes.processes import boot_id
from equipoise.policies.actions import Decision, Freeze, Throttle
from equipoise.policies.model import DecisionId, TenantId, ToolCallId

base, path, sandbox, leaf, frozen, stopped = sys.argv[1:]
now = time.monotonic_ns
driver = CgroupDriver.open(base=base)
journal = Journal.open(Path(path), boot_id=boot_id(), started_ns=now())
actuator = Actuator(Holds(journal, driver), driver, None)
guardian = Guardian.start(Path(path), base=base)
actuator.arm(sandbox)
actuator.bind(ToolCallId(1), leaf=leaf, pid=int(frozen))
actuator.bind(ToolCallId(2), pid=int(stopped))
def do(action):
    decision = Decision(DecisionId("d"), now(), "r", 0, 0, "", action, TenantId("t"), "s", "e")
    assert actuator.execute(decision).status.value == "completed"
do(Freeze(ToolCallId(1), now() + 60_000_000_000))
do(Throttle(ToolCallId(1), 1 << 20, 0.1, now() + 60_000_000_000))
do(Freeze(ToolCallId(2), now() + 60_000_000_000))
print(guardian.pid, flush=True)
sys.stdin.read()
"""


class Scene:
    """A sandbox with a tool call in a leaf, and a process that the daemon stops by signal."""

    def __init__(self, driver: CgroupDriver, spawn: Spawn) -> None:
        self.driver = driver
        self.sandbox = driver.create_sandbox(TenantId("gold"), "ada").path
        self.leaf = driver.create_tool_leaf(self.sandbox, ToolCallId(1))
        self.frozen, self.stopped = spawn(), spawn()
        assert driver.attach(self.frozen.pid, self.leaf).done
        assert driver.attach(self.stopped.pid, f"{self.sandbox}/runtime").done
        self.limits = {limit: driver.limit(self.leaf, limit) for limit in Limit}

    def held(self) -> bool:
        return self.driver.frozen(self.leaf) is True and self.is_stopped() and self.driver.restricted(self.leaf) >= 2

    def is_stopped(self) -> bool:
        found = processes.stat(self.stopped.pid)
        return found is not None and found.stopped

    def free(self) -> bool:
        limits = {limit: self.driver.limit(self.leaf, limit) for limit in Limit}
        return self.driver.frozen(self.leaf) is False and not self.is_stopped() and limits == self.limits


@pytest.fixture
def scene(driver: CgroupDriver, spawn: Spawn) -> Scene:
    return Scene(driver, spawn)


@pytest.fixture
def daemon(scene: Scene, spawn: Spawn, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The daemon in small, and the pid of its guardian."""
    arguments = (scene.driver.base, str(tmp_path / "j"), scene.sandbox, scene.leaf)
    child = spawn(DAEMON, *arguments, str(scene.frozen.pid), str(scene.stopped.pid))
    assert child.stdout is not None
    guardian = int(child.stdout.readline())
    assert eventually(scene.held)
    yield child, guardian
    child.kill()
    assert eventually(lambda: processes.identify(guardian) is None), "the guardian is gone after its work"


@pytest.mark.kernel
def test_after_a_kill_9_of_the_daemon_everything_goes_on(
    scene: Scene, daemon: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    child, _ = daemon
    child.kill()
    assert eventually(scene.free)
    assert eventually(lambda: not held_in(tmp_path / "j"))
    assert scene.frozen.poll() is None and scene.stopped.poll() is None, "and nothing was killed for it"


@pytest.mark.kernel
def test_the_guardian_is_deaf_to_what_ends_the_daemon(
    scene: Scene, daemon: tuple[subprocess.Popen[bytes], int]
) -> None:
    child, guardian = daemon
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guardian, number)
    os.killpg(os.getpgid(guardian), signal.SIGTERM)
    assert os.getsid(guardian) == guardian != os.getsid(child.pid)
    time.sleep(0.2)
    assert scene.held(), "it waits while the daemon lives"
    child.kill()
    assert eventually(scene.free)


@pytest.mark.kernel
def test_a_child_of_the_daemon_that_keeps_the_pipe_does_not_delay_the_release(
    driver: CgroupDriver, spawn: Spawn, tmp_path: Path
) -> None:
    child = spawn(
        "import os, sys, time; from pathlib import Path; from equipoise.daemon.enforce.guardian import Guardian\n"
        f"g = Guardian.start(Path({str(tmp_path / 'j')!r}), base={driver.base!r})\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(600)\n"
        "print(g.pid, pid, flush=True); sys.stdin.read()"
    )
    assert child.stdout is not None
    guardian, forked = (int(pid) for pid in child.stdout.readline().split())
    child.kill()
    try:
        assert eventually(lambda: processes.identify(guardian) is None)
    finally:
        os.kill(forked, signal.SIGKILL)


@pytest.mark.kernel
@pytest.mark.parametrize("state", ["missing", "locked", "damaged"])
def test_without_a_usable_journal_the_base_is_walked(
    state: str, scene: Scene, daemon: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    child, guardian = daemon
    path, locker = tmp_path / "j", None
    if state == "missing":
        for file in tmp_path.iterdir():
            file.unlink()
    elif state == "locked":
        os.kill(guardian, signal.SIGSTOP)
        child.kill()
        child.wait(5)
        # Somebody who lets nobody else even read, and stays.
        locker = sqlite3.connect(path, isolation_level=None)
        locker.execute("PRAGMA locking_mode = EXCLUSIVE")
        locker.execute("BEGIN EXCLUSIVE")
        os.kill(guardian, signal.SIGCONT)
    else:
        for file in tmp_path.iterdir():
            file.write_bytes(b"\0" * 8192)
    child.kill()
    assert eventually(scene.free, within_s=10)
    if locker is not None:
        locker.close()


@pytest.mark.kernel
def test_a_next_daemon_that_has_the_journal_is_left_to_do_it(
    scene: Scene, daemon: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    child, guardian = daemon
    os.kill(guardian, signal.SIGSTOP)
    child.kill()
    child.wait(5)
    journal = Journal.open(tmp_path / "j", boot_id=boot_id(), started_ns=time.monotonic_ns())
    os.kill(guardian, signal.SIGCONT)
    assert eventually(lambda: processes.identify(guardian) is None)
    assert scene.held(), "the guardian kept out of the next daemon's way"
    assert len(journal.held()) == 4
    result = release(tmp_path / "j", scene.driver)
    assert result.complete and scene.free() and not journal.held()
    journal.close()


@pytest.mark.kernel
def test_a_release_finds_what_no_journal_knows_of_and_a_second_finds_nothing(scene: Scene) -> None:
    scene.driver.freeze(scene.leaf)
    scene.driver.set_cpu_quota(scene.leaf, 0.1)
    os.kill(scene.stopped.pid, signal.SIGSTOP)
    assert eventually(scene.held)
    first = release(None, scene.driver)
    assert first.complete and first.found_count == 3
    assert eventually(scene.free)
    assert release(None, scene.driver).found_count == 0


@pytest.mark.kernel
def test_a_stop_by_the_kernel_just_before_the_daemon_died_is_undone_by_what_was_armed(
    scene: Scene, journal: Journal
) -> None:
    journal.take([Hold(HoldKind.ARMED, HoldCause.BUDGET, 1, None, path=scene.sandbox)])
    os.kill(scene.stopped.pid, signal.SIGSTOP)
    assert eventually(scene.is_stopped)
    elsewhere = CgroupDriver(scene.driver.layout, "eqtest-nowhere")  # a base in which the walk finds nothing
    result = release(journal.path, elsewhere)
    assert result.undone_count == 1 and result.found_count == 0
    assert eventually(lambda: not scene.is_stopped())
    elsewhere.close()


def test_holds_whose_target_is_gone_are_struck_out_without_complaint(spawn: Spawn, journal: Journal) -> None:
    child = spawn()
    alive = processes.identify(child.pid)
    assert alive is not None
    recycled = ProcessRef(child.pid, alive.start_ticks - 1)
    journal.take([Hold(stop.STOP, freeze.CAUSE, 1, SOON_NS, process=recycled)])
    os.kill(child.pid, signal.SIGSTOP)
    assert eventually(lambda: stopped(alive))
    result = release(journal.path, None)
    assert (result.undone_count, result.gone_count, result.complete) == (0, 1, True)
    assert not journal.held()
    assert stopped(alive), "the process that has the pid now was not touched"


def test_holds_of_another_boot_are_not_acted_on(spawn: Spawn, tmp_path: Path) -> None:
    child = spawn()
    ref = processes.identify(child.pid)
    assert ref is not None
    journal = Journal.open(tmp_path / "j", boot_id="another boot", started_ns=1)
    journal.take([Hold(stop.STOP, freeze.CAUSE, 1, SOON_NS, process=ref)])
    journal.close()
    os.kill(child.pid, signal.SIGSTOP)
    assert eventually(lambda: stopped(ref))
    assert release(tmp_path / "j", None).undone_count == 0
    assert stopped(ref)


def test_a_guardian_can_be_closed_and_says_whether_it_lives(tmp_path: Path) -> None:
    guardian = Guardian.start(tmp_path / "j", base=None)
    assert guardian.alive()
    guardian.close()
    assert not guardian.alive()


def stopped(ref: ProcessRef) -> bool:
    found = processes.look(ref)
    return found is not None and found.stopped


def held_in(path: Path) -> tuple[Hold, ...]:
    with JournalReader(path) as reader:
        return reader.holds(boot_id())
