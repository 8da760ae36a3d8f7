"""A daemon that comes back finds its sandboxes, agents and calls again, says so, and invents nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.observe.journal import JournalReader
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.daemon.sandboxes.processes import boot_id
from equipoise.tests.fixtures.agents_at_work import restarts
from equipoise.tests.fixtures.running_daemon import (
    CLI,
    MIB,
    RunningDaemon,
    end,
    eventually,
    grow,
    process_state,
    with_probes,
)

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
TOOL = (*CLI, "tool", "--")
FULL = pytest.mark.skipif("EQUIPOISE_FULL" not in os.environ, reason="takes minutes: EQUIPOISE_FULL=1 runs it")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path) as running:
        yield running


def restart(daemon: RunningDaemon, how: str = "kill", *arguments: str) -> None:
    if how == "kill":
        daemon.kill()
    else:
        assert daemon.stop() == 0
    daemon.start(*arguments)


class Gate:
    """What a call waits at until the test opens it: a restart takes as long as it takes."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.path = folder / name
        self.shell = f"while [ ! -e {self.path} ]; do sleep 0.05; done"
        self.python = f"exec(\"while not __import__('os').path.exists('{self.path}'): time.sleep(0.05)\")"

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def one(daemon: RunningDaemon, containing: str):
    [call] = daemon.tool_calls(containing)
    return call


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_agents_and_their_calls_go_on_under_the_next_daemon(daemon, gate, how):
    ada, eve = daemon.agent("gold", "ada"), daemon.agent("silver", "eve")
    before = {s.name: s for s in daemon.watch().sandboxes}
    ada.begin("sh", "-c", f"{gate.shell}; exit 7 # by-lineage")
    eve.begin(*TOOL, *grow(90, f"{gate.python}; raise SystemExit(5)  # by-wrapper"))
    eventually(lambda: "grant 128 MiB" in {d.action for d in daemon.decisions()})
    eventually(lambda: one(daemon, "by-wrapper").used_bytes > 90 * MIB and daemon.tool_calls("by-lineage"))
    eventually(lambda: one(daemon, "by-wrapper").source == "wrapper")
    lineage, wrapper = one(daemon, "by-lineage"), one(daemon, "by-wrapper")
    time.sleep(0.6)
    restart(daemon, how)
    assert daemon.status().adopted == (
        "of an earlier run: 2 sandboxes and 2 tool calls taken up again, 0 calls found that began meanwhile, 0 ended "
        "meanwhile"
    )
    after = {s.name: s for s in daemon.watch().sandboxes}
    for name in ("ada", "eve"):
        same = ("cgroup_id", "cgroup_path", "session_id", "agent_pid", "tenant_id")
        assert [getattr(after[name], f) for f in same] == [getattr(before[name], f) for f in same]
    for known, now in ((lineage, one(daemon, "by-lineage")), (wrapper, one(daemon, "by-wrapper"))):
        assert (now.tool_call_id, now.start_ns, now.source) == (known.tool_call_id, known.start_ns, known.source)
        assert (now.pid, now.session_id, now.phase) == (known.pid, known.session_id, "running")
    assert one(daemon, "by-wrapper").hard_bytes == wrapper.hard_bytes >= 128 * MIB, "as it was granted"
    assert [d.action for d in daemon.decisions(wrapper.tool_call_id)] == ["grant 128 MiB"]
    eventually(lambda: one(daemon, "by-wrapper").used_bytes > 90 * MIB)
    gate.open()
    assert (ada.result().returncode, eve.result().returncode) == (7, 5)
    eventually(lambda: [one(daemon, w).exit_code for w in ("by-lineage", "by-wrapper")] == [7, 5])
    assert ada.call("sh", "-c", "exit 3 # the-next").returncode == 3
    eventually(lambda: one(daemon, "the-next").exit_code == 3)
    assert ada.leave() == eve.leave() == 0
    eventually(lambda: not daemon.watch().sandboxes)
    assert all(c.end_ns for c in daemon.tool_calls()) and "Traceback" not in daemon.said()


def test_what_ended_and_what_began_meanwhile_is_told_apart(daemon, gate, tmp_path):
    ada, gone, escaping = daemon.agent("gold", "ada"), daemon.agent("gold", "gone"), daemon.agent("gold", "escaping")
    meanwhile = Gate(tmp_path, "meanwhile")
    ada.begin("sh", "-c", f"{meanwhile.shell}; exit 9 # ends-meanwhile")
    gone.begin("sleep", "987")
    escaping.begin("sh", "-c", f"setsid sleep 654 >/dev/null 2>&1 & {meanwhile.shell}; : escapes-meanwhile")
    for word in ("ends-meanwhile", "sleep 987", "escapes-meanwhile"):
        eventually(partial(daemon.tool_calls, word))
    its_call = one(daemon, "sleep 987").pid
    daemon.kill()
    end(gone.pid)
    end(its_call)
    meanwhile.open()
    assert ada.result().returncode == 9
    assert escaping.result().returncode == 0
    ada.begin("sh", "-c", f"{gate.shell}; exit 6 # begins-meanwhile")
    time.sleep(0.3)
    daemon.start()
    assert {s.name for s in daemon.watch().sandboxes} == {"ada", "escaping"}
    for word in ("ends-meanwhile", "sleep 987"):
        call = one(daemon, word)
        assert call.phase == "ended" and not call.HasField("exit_code") and not call.HasField("signal")
    found = one(daemon, "begins-meanwhile")
    assert (found.phase, found.source, found.sandbox) == ("running", "lineage", "ada")
    escaped = one(daemon, "escapes-meanwhile")
    assert (escaped.phase, escaped.escaped_count) == ("ended", 1) and not escaped.HasField("exit_code")
    gate.open()
    assert ada.result().returncode == 6
    eventually(lambda: one(daemon, "begins-meanwhile").exit_code == 6)
    driver = CgroupDriver.open(base=daemon.base)
    driver.kill(f"{daemon.base}/gold/escaping/tools")
    driver.close()
    ada.leave()
    escaping.leave()
    eventually(lambda: not daemon.watch().sandboxes)


def test_a_pid_that_another_has_by_now_is_not_taken_for_the_agent(daemon):
    ada = daemon.agent("gold", "ada")
    daemon.kill()
    end(ada.pid)
    ada.process.wait()
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        with sqlite3.connect(daemon.state / "journal.sqlite") as journal:
            journal.execute("UPDATE registered SET body = json_set(body, '$.agent_pid', ?)", (other.pid,))
        daemon.start()
        assert not daemon.watch().sandboxes
        assert daemon.base not in Path(f"/proc/{other.pid}/cgroup").read_text()
        assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}/gold"))
    finally:
        other.kill()
        other.wait()


def test_what_a_hook_announced_is_ended_by_its_own_id_after_a_restart(daemon, gate, tmp_path):
    """One whose process is known, one whose process begins under the next daemon, one that ended meanwhile."""
    ada, eve = daemon.agent("gold", "ada"), daemon.agent("silver", "eve")

    def announce(name: str, tenant: str, external: str) -> str:
        request = sandbox_pb2.BeginToolCallRequest(
            tenant_id=tenant, name=name, command=f"Bash: {external}", external_id=external
        )
        return str(daemon.sandboxes.BeginToolCall(request).tool_call_id)

    def ended(external_id: str = "", tool_call_id: str = "") -> str:
        request = sandbox_pb2.EndToolCallRequest(external_id=external_id, tool_call_id=tool_call_id)
        return str(daemon.sandboxes.EndToolCall(request).tool_call_id)

    first = announce("ada", "gold", "toolu_1")
    ada.begin("sh", "-c", f"{gate.shell}; exit 4 # under-a-hook")
    known = eventually(lambda: [c for c in daemon.tool_calls("toolu_1") if c.pid])[0]
    second = announce("eve", "silver", "toolu_2")
    eventually(lambda: daemon.tool_calls("toolu_2"))
    restart(daemon)
    assert announce("ada", "gold", "toolu_1") == known.tool_call_id, "it is no new call"
    [call] = daemon.tool_calls("toolu_1")
    assert (call.tool_call_id, call.source, call.agent_call_id) == (known.tool_call_id, "hook", "toolu_1")
    eve.begin("sh", "-c", "sleep 0.3; exit 5 # begins-later")
    later = eventually(lambda: [c for c in daemon.tool_calls("toolu_2") if c.pid])[0]
    assert not daemon.tool_calls("begins-later"), "it is the announced one"
    gate.open()
    assert (ada.result().returncode, eve.result().returncode) == (4, 5)
    assert ended(external_id="toolu_1") == ended(tool_call_id=first) == known.tool_call_id
    assert ended(external_id="toolu_2") == ended(tool_call_id=second) == later.tool_call_id
    assert [one(daemon, w).exit_code for w in ("toolu_1", "toolu_2")] == [4, 5]
    third, meanwhile = announce("ada", "gold", "toolu_3"), Gate(tmp_path, "meanwhile")
    ada.begin("sh", "-c", f"{meanwhile.shell}; exit 6")
    eventually(lambda: [c for c in daemon.tool_calls("toolu_3") if c.pid])
    daemon.kill()
    meanwhile.open()
    assert ada.result().returncode == 6
    daemon.start()
    assert ended(external_id="toolu_3") == ended(tool_call_id=third) != ""


def test_a_budget_holds_after_a_restart(daemon, gate):
    """The kernel stops what grows, the next daemon answers: nobody runs free because he has two masters."""
    ada = daemon.agent("gold", "ada")
    ada.begin(*TOOL, *grow(30, f"{gate.python}; held.append(bytearray(b'x' * (300 << 20)))  # grows-later"))
    # The wrapper itself holds as much before it has announced its call.
    calls = partial(daemon.tool_calls, "grows-later")
    eventually(lambda: any(c.source == "wrapper" and c.used_bytes > 30 * MIB for c in calls()))
    restart(daemon)
    gate.open()
    assert ada.result().returncode == 137
    call = eventually(lambda: one(daemon, "grows-later").end_ns and one(daemon, "grows-later"))
    assert call.signal == 9 and call.peak_bytes < 200 * MIB
    assert process_state(ada.pid) in "SR" and ada.call("echo", "alive").stdout == "alive\n"


def test_without_the_journal_the_tree_alone_says_what_is_there(daemon, gate):
    ada = daemon.agent("gold", "ada")
    ada.begin("sh", "-c", f"{gate.shell}; exit 4 # of-the-tree")
    [call] = eventually(lambda: daemon.tool_calls("of-the-tree"))
    daemon.kill()
    for file in daemon.state.glob("journal.sqlite*"):
        file.unlink(missing_ok=True)  # the guardian, on its way out, removes the log itself
    daemon.start()
    [box] = daemon.watch().sandboxes
    assert (box.tenant_id, box.name, box.agent_pid) == ("gold", "ada", ada.pid)
    found = one(daemon, "of-the-tree")
    assert (found.tool_call_id, found.phase) == (call.tool_call_id, "running"), "its leaf is called so"
    gate.open()
    assert ada.result().returncode == 4
    eventually(lambda: one(daemon, "of-the-tree").exit_code == 4)
    # That the first program is the agent itself was on record, and is lost: what it starts may be the agent.
    ada.begin("sh", "-c", "sleep 0.5; exit 8 # later")
    eventually(lambda: [p.role for p in daemon.watch().processes if "# later" in p.command] == ["start-up"])
    assert ada.result().returncode == 8 and not daemon.tool_calls("later")


def test_a_restart_makes_no_call_of_what_may_be_the_agent(daemon, gate):
    """A launcher, the agent below it and a child of that: nobody has spoken to a model yet."""
    script = f"{gate.shell}; exit 6 # the-agent"
    command = [*CLI, "run", "--tenant", "gold", "--name", "shy", "--", "timeout", "90", "sh", "-c", script]
    shy = subprocess.Popen(command, env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket)})
    try:
        eventually(lambda: [p for p in daemon.watch().processes if "the-agent" in p.command])
        daemon.kill()
        daemon.start()
        eventually(lambda: [p.role for p in daemon.watch().processes if "the-agent" in p.command] == ["start-up"])
        assert not daemon.tool_calls("the-agent")
        gate.open()
        assert shy.wait(20) == 6
    finally:
        shy.kill()
        shy.wait()


def test_what_cannot_be_taken_up_is_said_and_left_alone(daemon, gate):
    eve = daemon.agent("silver", "eve")
    eve.begin("sh", "-c", f"{gate.shell}; echo unharmed # left-alone")
    eventually(lambda: daemon.tool_calls("left-alone"))
    daemon.kill()
    daemon.policy.write_text(daemon.policy.read_text().replace(", silver: {weight: 1}", ""))
    daemon.start()
    [line] = [line for line in daemon.status().lacks if line.startswith("not taken up again: ")]
    assert "silver/eve" in line and "knows no such tenant" in line and "not_adopted" in daemon.said()
    assert not daemon.watch().sandboxes
    gate.open()
    assert eve.result().stdout == "unharmed\n"


def test_a_container_and_a_sandbox_without_an_agent_stay_registered(daemon):
    driver = CgroupDriver.open(base=f"{daemon.base}-foreign")
    for hierarchy in driver.layout.hierarchies:
        (hierarchy.mount / driver.base).mkdir()
    try:
        for name, path in (("box", driver.base), ("ahead", "")):
            daemon.sandboxes.RegisterSandbox(
                sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name=name, cgroup_path=path, session_id="talk")
            )
        daemon.sandboxes.RegisterSandbox(sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="removed"))
        daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="gold", name="removed"))
        restart(daemon)
        boxes = {s.name: (s.cgroup_path, s.session_id) for s in daemon.watch().sandboxes}
        assert boxes == {"box": (driver.base, "gold/talk"), "ahead": (f"{daemon.base}/gold/ahead", "gold/talk")}
        ada = daemon.agent("gold", "ahead")
        assert ada.call("sh", "-c", "exit 2 # in-it").returncode == 2
        eventually(lambda: one(daemon, "in-it").exit_code == 2)
    finally:
        driver.remove(driver.base)
        driver.close()


def by_its_boot(decision):
    """Without the wall clock, which each run holds against the boot's anew."""
    decision.ClearField("at_unix_ns")
    return decision


def test_what_was_before_is_answered_from_the_journal(daemon):
    ada = daemon.agent("gold", "ada")
    killed = ada.call(*TOOL, *grow(4000, "'wild-one'"))
    assert killed.returncode == 137
    for number in range(5):
        ada.call("sh", "-c", f"exit {number} # number-{number}")
    ada.leave()
    eventually(lambda: not daemon.watch().sandboxes)
    wild, told = one(daemon, "wild-one"), [by_its_boot(d) for d in daemon.decisions()]
    before = daemon.cli("ps", "--all").stdout
    for how in ("kill", "stop"):
        restart(daemon, how)
        assert daemon.status().adopted == ""
        assert daemon.cli("ps", "--all").stdout == before
        assert [by_its_boot(d) for d in daemon.decisions()] == told
        shown = daemon.cli("explain", wild.tool_call_id[-8:])
        assert "kill the tool call" in shown.stdout and "because" in shown.stdout
        assert daemon.cli("ps").stdout == "no tool calls\n"


def test_without_probes_calls_are_found_again_by_their_leaves(tmp_path, gate):
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    daemon = RunningDaemon(tmp_path)
    try:
        daemon.start("--no-ebpf")
        ada = daemon.agent()
        ada.begin(*TOOL, "sh", "-c", f"{gate.shell}; exit 6 # leaf")
        [known] = eventually(lambda: daemon.tool_calls("# leaf"))
        restart(daemon, "kill", "--no-ebpf")
        now = one(daemon, "# leaf")
        assert (now.tool_call_id, now.phase, now.start_ns) == (known.tool_call_id, "running", known.start_ns)
        gate.open()
        assert ada.result().returncode == 6
        eventually(lambda: one(daemon, "# leaf").exit_code == 6, shown=lambda: daemon.tool_calls())
        ada.leave()
        eventually(lambda: not daemon.watch().sandboxes)
    finally:
        daemon.close()


@pytest.mark.parametrize(("agents", "times"), [(6, 8), pytest.param(20, 50, marks=FULL)])
def test_no_call_is_lost_doubled_or_invented_by_kills_under_agents_at_work(daemon, agents, times):
    found, seconds = restarts(daemon, agents, times)
    print(f"{agents} agents, {times} kills in {seconds:.0f} s: {found}")
    assert found.perfect, found
    assert found.due > agents and found.adopted > times
    assert "Traceback" not in daemon.said() and "turn_failed" not in daemon.said()
    with JournalReader(daemon.state / "journal.sqlite") as reader:
        assert reader.open_calls(boot_id()) == () and reader.registered(boot_id()) == ()
    os.kill(daemon.process.pid, signal.SIGTERM)
    daemon.process.wait(20)
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{daemon.base}"))
