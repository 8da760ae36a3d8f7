"""Registering: what is refused before anything is touched, and that what fails later leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from equipoise.daemon.errors import CgroupError, Refusal, RegistrationRefused
from equipoise.daemon.sandboxes import registering
from equipoise.daemon.sandboxes.keeper import SandboxKeeper
from equipoise.ebpf.errors import EbpfError
from equipoise.policies.events import Event
from equipoise.policies.model import CgroupId, Sandbox, SessionId, TenantId, ToolCallId
from equipoise.policies.state import State

GOLD, SILVER = TenantId("gold"), TenantId("silver")
PF_KTHREAD = 0x200000


def stat_line(pid: int, *, parent: int = 1, state: str = "S", flags: int = 0, start: int = 77) -> str:
    return f"{pid} (a (b) c) {state} {parent} 1 1 0 -1 {flags} {'0 ' * 12}{start} 0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """init, a shell that started the daemon (50), its guardian (60) and its child; a kernel thread; an agent."""
    lines = {
        1: stat_line(1, parent=0),
        2: stat_line(2, parent=0, flags=PF_KTHREAD),
        9: stat_line(9, parent=2, flags=PF_KTHREAD),
        40: stat_line(40),
        50: stat_line(50, parent=40),
        60: stat_line(60, parent=50),
        61: stat_line(61, parent=60),
        70: stat_line(70, parent=40),
        80: stat_line(80, state="Z"),
    }
    for pid, line in lines.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(line)
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nTgid:\t{pid}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("pid", "reason", "says"),
    [
        (-4, Refusal.INVALID, "pid -4: give the pid of a process"),
        (99, Refusal.NOT_FOUND, "no process 99"),
        (80, Refusal.NOT_FOUND, "no process 80"),
        (1, Refusal.FORBIDDEN, "pid 1 is init: give the pid of an agent"),
        (2, Refusal.FORBIDDEN, "pid 2 is a thread of the kernel"),
        (9, Refusal.FORBIDDEN, "pid 9 is a thread of the kernel"),
        (50, Refusal.FORBIDDEN, "pid 50 is the daemon"),
        (60, Refusal.FORBIDDEN, "pid 60 is a child of the daemon (pid 50)"),
        (61, Refusal.FORBIDDEN, "pid 61 is a child of the daemon (pid 50)"),
        (40, Refusal.FORBIDDEN, "pid 40 is what the daemon (pid 50) was started by"),
    ],
)
def test_a_process_that_is_no_agent_is_refused(proc, pid, reason, says):
    with pytest.raises(RegistrationRefused) as raised:
        registering.check_process(pid, daemon_pid=50, proc_root=proc)
    assert raised.value.reason is reason and says in str(raised.value) and "\n" not in str(raised.value)


def test_an_agent_is_answered_by_its_identity(proc):
    found = registering.check_process(70, daemon_pid=50, proc_root=proc)
    assert (found.pid, found.start_ticks) == (70, 77)


def test_a_thread_is_no_process():
    ids: list[int] = []
    release = threading.Event()

    def live() -> None:
        ids.append(threading.get_native_id())
        release.wait()

    thread = threading.Thread(target=live)
    thread.start()
    while not ids:
        time.sleep(0.001)
    try:
        with pytest.raises(RegistrationRefused, match=f"is a thread: give its process, {os.getpid()}") as raised:
            registering.check_process(ids[0], daemon_pid=1)
        assert raised.value.reason is Refusal.INVALID
    finally:
        release.set()
        thread.join()


def sandbox(path: str, name: str = "ada") -> Sandbox:
    return Sandbox(CgroupId(7), GOLD, name, path, SessionId("gold/ada"), None, 1)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../../..", Refusal.INVALID),
        ("box/../equipoise", Refusal.INVALID),
        ("/", Refusal.INVALID),
        ("box/./x", Refusal.INVALID),
        ("equipoise", Refusal.FORBIDDEN),
        ("//equipoise//", Refusal.FORBIDDEN),
        ("equipoise/gold", Refusal.FORBIDDEN),
        ("equipoise/gold/ada/tools", Refusal.FORBIDDEN),
        ("host/daemon", Refusal.FORBIDDEN),
        ("host", Refusal.FORBIDDEN),
        ("taken", Refusal.TAKEN),
        ("taken/inner", Refusal.TAKEN),
        ("outer", Refusal.TAKEN),
        ("nowhere", Refusal.NOT_FOUND),
    ],
)
def test_a_cgroup_that_is_ours_or_anothers_is_refused(v2_tree, path, reason):
    (v2_tree.proc / "self/cgroup").write_text("0::/host/daemon\n")
    for there in ("box", "equipoise/gold/ada/tools", "host/daemon", "taken/inner", "outer/x"):
        (v2_tree.root / there).mkdir(parents=True)
    known = (sandbox("taken"), sandbox("outer/x", "eve"), sandbox("", "without"))
    with pytest.raises(RegistrationRefused) as raised:
        registering.check_cgroup(path, v2_tree.driver(), known)
    assert raised.value.reason is reason and "\n" not in str(raised.value)


def test_a_base_below_another_cgroup_forbids_that_one_too(v2_tree):
    (v2_tree.root / "system/equipoise").mkdir(parents=True)
    with pytest.raises(RegistrationRefused, match="part of our own tree"):
        registering.check_cgroup("system", v2_tree.driver("system/equipoise"), ())


def test_a_container_is_answered_by_the_one_way_to_write_its_path(v2_tree):
    (v2_tree.root / "pods/box").mkdir(parents=True)
    (v2_tree.root / "pods/boxer").mkdir()
    assert registering.check_cgroup("//pods///box/", v2_tree.driver(), (sandbox("pods/boxer"),)) == "pods/box"


@pytest.mark.parametrize("name", ["", ".", "..", "../../..", ".daemon", "a/b", "x" * 65, "a\n", "-x", "ä"])
def test_there_is_one_rule_for_names(name):
    with pytest.raises(RegistrationRefused, match="use up to 64 letters, digits"):
        registering.check_name(name)


# -- a step that fails after the move


class Refusing:
    """Probes that cannot follow the process that they are asked to."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.forgotten: list[int] = []

    def tag_of(self, pid: int) -> ToolCallId | None:
        return None

    def register_agent(self, pid: int, sandbox: CgroupId, **_: int) -> ToolCallId:
        raise self.error

    def forget(self, tag: ToolCallId) -> None:
        self.forgotten.append(tag)


@pytest.fixture
def beside_us(monkeypatch):
    """The test is no daemon: its children may be agents."""
    monkeypatch.setattr(registering, "check_process", partial(registering.check_process, daemon_pid=1))


def keeper_with(driver, probes, events: list[Event] | None = None) -> SandboxKeeper:
    """Its events are applied at once, and noted."""
    state = State()

    def emit(event: Event) -> None:
        state.apply(event)
        if events is not None:
            events.append(event)

    return SandboxKeeper(driver, probes, state, emit, lambda: None, time.monotonic_ns)


def cgroups_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


@pytest.mark.kernel
@pytest.mark.parametrize("error", [EbpfError("all 2048 tool records are in use"), ProcessLookupError("no process")])
async def test_a_failed_registration_moves_the_process_back_and_leaves_no_cgroup(beside_us, driver, spawn, error):
    """Not our own cgroup: one of its own in each hierarchy, to be told from where our tests run."""
    child = spawn()
    home = f"{driver.base}/home"
    for hierarchy in driver.layout.hierarchies:
        (hierarchy.mount / home).mkdir()
    assert driver.attach(child.pid, home).done
    before = cgroups_of(child.pid)
    with pytest.raises(type(error)):
        keeper_with(driver, Refusing(error)).register(GOLD, "ada", child.pid, None, None)
    assert cgroups_of(child.pid) == before
    assert [path for path in driver.below(driver.base) if "gold" in path] == []


@pytest.mark.kernel
async def test_what_one_hierarchy_refuses_is_undone_in_the_others(beside_us, driver, spawn):
    child = spawn()
    before = cgroups_of(child.pid)
    last = driver.layout.unified

    def join(hierarchy, path, pid, real=driver._join):
        if hierarchy == last and path.endswith("/runtime"):
            return SimpleNamespace(done=False, detail="refused")
        return real(hierarchy, path, pid)

    driver._join = join
    with pytest.raises(CgroupError, match=f"pid {child.pid} could not be moved"):
        keeper_with(driver, None).register(GOLD, "ada", child.pid, None, None)
    assert cgroups_of(child.pid) == before
    assert driver.below(driver.base) == (driver.base,)


@pytest.mark.kernel
async def test_a_process_of_another_sandbox_is_left_there(beside_us, driver, spawn):
    child = spawn()
    events: list[Event] = []
    keeper = keeper_with(driver, None, events)
    first = keeper.register(GOLD, "ada", child.pid, None, None)
    before, count = cgroups_of(child.pid), len(events)
    with pytest.raises(RegistrationRefused, match="is in sandbox gold/ada already") as raised:
        keeper.register(SILVER, "eve", child.pid, None, None)
    assert raised.value.reason is Refusal.TAKEN
    assert keeper.register(GOLD, "ada", child.pid, None, None) == first and len(events) == count, "idempotent"
    assert cgroups_of(child.pid) == before
    assert [path for path in driver.below(driver.base) if "silver" in path] == []
    child.kill()
    child.wait()
    keeper.close()


@pytest.mark.kernel
async def test_a_living_agent_keeps_its_name_and_a_gone_one_gives_it_up(beside_us, driver, spawn):
    one, two = spawn(), spawn()
    keeper = keeper_with(driver, None)
    keeper.register(GOLD, "ada", one.pid, None, SessionId("talk"))
    says = rf"gold/ada is held by pid {one.pid} since \d\d:\d\d:\d\d \(0 s ago\): give another --name"
    with pytest.raises(RegistrationRefused, match=says):
        keeper.register(GOLD, "ada", two.pid, None, None)
    assert subprocess.run(["grep", "-q", "gold", f"/proc/{two.pid}/cgroup"], check=False).returncode == 1
    one.kill()
    one.wait()
    taken = keeper.register(GOLD, "ada", two.pid, None, None)
    assert (taken.agent_pid, taken.session) == (two.pid, "talk")
    two.kill()
    two.wait()
    keeper.close()
