"""Odd commands and odd lives: right, or said to be unknown, never wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.policies.shown import printable
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, eventually, with_probes
from equipoise.tests.fixtures.scripted_agent import AGENT, Model

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
ODD = {
    "a newline": ("true", "odd", "one\ntwo"),
    "quotes": ("true", "odd", 'it\'s "quoted" \\ $HOME `id`'),
    "control characters": ("true", "odd", "\x1b]0;owned\x07\x1b[31m\r\tred"),
    "markup": ("true", "odd", "[bold]not bold[/bold] [/]"),
    "no characters": ("true", "odd", "", " ", ""),
    "other alphabets": ("true", "odd", "naïve ✓ 日本語 \u202e"),
    "not UTF-8": ("true", "odd", "\udcff\udcfe\udc80end"),
    "4 KB of arguments": ("true", "odd", "x" * 4096),
    "4000 arguments": ("true", "odd", *("a" for _ in range(4000))),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("odd")) as running:
        yield running


def test_a_command_of_any_characters_is_one_call_and_is_shown_without_acting_on_the_terminal(daemon):
    agent = daemon.agent("gold", "odd")
    for argv in ODD.values():
        assert agent.call(*argv).returncode == 0
    agent.leave()
    eventually(lambda: all(c.end_ns for c in daemon.tool_calls()))
    shown = daemon.tool_calls("true odd")
    assert len(shown) == len(ODD)
    for call, argv in zip(shown, ODD.values(), strict=True):
        told = os.fsencode(" ".join(argv)).decode(errors="replace").strip()
        assert call.command == told or (call.command.endswith("…") and told.startswith(call.command[:-1])), argv
        assert call.exit_code == 0 and call.source == "lineage"
    listed = daemon.cli("ps", "--all")
    assert listed.returncode == 0 and listed.stdout.count("true odd") == len(ODD)
    assert all(printable(line) == line for line in listed.stdout.splitlines()), listed.stdout
    told = json.loads(daemon.cli("ps", "--all", "--json").stdout)
    assert "\x1b]0;owned" in json.dumps(told, ensure_ascii=False) or "\\u001b]0;owned" in json.dumps(told)


def test_a_name_that_was_used_before_is_a_new_sandbox_with_calls_of_its_own(daemon):
    ids = []
    for code in (3, 4):
        agent = daemon.agent("gold", "twice")
        assert agent.call("sh", "-c", f"exit {code} # twice").returncode == code
        (sandbox,) = [s for s in daemon.watch().sandboxes if s.name == "twice"]
        ids.append(sandbox.cgroup_id)
        agent.leave()
        eventually(lambda: not [s for s in daemon.watch().sandboxes if s.name == "twice"])
    assert ids[0] != ids[1]
    assert [c.exit_code for c in daemon.tool_calls("# twice")] == [3, 4]
    assert all(c.sandbox == "twice" and c.end_ns for c in daemon.tool_calls("# twice"))


def test_in_a_pid_namespace_where_each_call_has_the_same_pid_each_is_a_call_of_its_own(daemon):
    model = Model()
    model.start()
    run = ["run", "--tenant", "gold", "--name", "inner", "--"]
    launcher = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    process = subprocess.Popen(
        [*CLI, *run, *launcher, sys.executable, "-S", "-u", "-c", AGENT, str(model.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket)},
    )

    def do(statement: str) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(statement + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    def calls():
        return [c for c in daemon.tool_calls("reused") if c.sandbox == "inner"]

    try:
        do("assert os.getpid() == 1; speak(); time.sleep(0.5)")
        for code in range(1, 6):
            do("open('/proc/sys/kernel/ns_last_pid', 'w').write('41')")
            do(f"p = subprocess.Popen(['sh', '-c', 'exit {code} # reused']); assert p.pid == 42, p.pid; p.wait()")
        eventually(lambda: [c.exit_code for c in calls() if c.end_ns] == [1, 2, 3, 4, 5])
        assert len({c.pid for c in calls()}) == 5, "as the daemon's own namespace numbers them"
    finally:
        process.communicate(timeout=20)
        model.close()


RUNS_LINES = """import subprocess, sys
for line in sys.stdin:
    subprocess.run(["sh", "-c", line])
    print("done", flush=True)
"""


class Cgroup:
    """A cgroup of the test's own outside the daemon's base, with a process in it that runs what it is told to."""

    def __init__(self, daemon: RunningDaemon, name: str) -> None:
        self.driver = CgroupDriver.open(base=f"{daemon.base}-{name}")
        self.path = self.driver.base
        self.process: subprocess.Popen[str] | None = None

    def make(self) -> int:
        """Make it, with an agent inside; its id."""
        for hierarchy in self.driver.layout.hierarchies:
            (hierarchy.mount / self.path).mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", RUNS_LINES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.driver.attach(self.process.pid, self.path)
        found = self.driver.cgroup_id(self.path)
        assert found is not None
        return found

    def run(self, text: str) -> None:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.driver.kill(self.path)  # what it left behind in the background
        self.driver.remove(self.path, patience_s=3.0)

    def close(self) -> None:
        self.end()
        self.driver.close()


@pytest.fixture
def cgroup(daemon: RunningDaemon) -> Iterator[Cgroup]:
    made = Cgroup(daemon, "foreign")
    yield made
    made.close()


def register(daemon: RunningDaemon, cgroup: Cgroup, name: str) -> None:
    assert cgroup.process is not None
    request = sandbox_pb2.RegisterSandboxRequest(
        tenant_id="gold", name=name, cgroup_path=cgroup.path, pid=cgroup.process.pid, direct=True
    )
    daemon.sandboxes.RegisterSandbox(request)


def test_a_cgroup_that_is_removed_and_made_again_is_another_sandbox(daemon, cgroup):
    first = cgroup.make()
    register(daemon, cgroup, "remade")
    cgroup.run("exit 3 # remade")
    cgroup.end()
    second = cgroup.make()
    assert first != second

    def taken() -> bool:
        try:
            register(daemon, cgroup, "remade")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS, error
            return False
        return True

    eventually(taken)
    cgroup.run("exit 4 # remade")
    eventually(lambda: [c.exit_code for c in daemon.tool_calls("# remade") if c.end_ns] == [3, 4])
    assert [s.name for s in daemon.watch().sandboxes].count("remade") == 1
    cgroup.end()
    eventually(lambda: "remade" not in {s.name for s in daemon.watch().sandboxes})


def test_what_began_before_its_agent_was_known_is_no_call_and_what_begins_after_it_is(tmp_path):
    daemon = RunningDaemon(tmp_path)
    cgroup = Cgroup(daemon, "early")
    try:
        cgroup.make()
        cgroup.run("sleep 30 >/dev/null & # before")  # what holds the pipe holds up the end
        daemon.start()
        register(daemon, cgroup, "early")
        cgroup.run("exit 5 # after")
        eventually(
            lambda: [(c.command, c.exit_code) for c in daemon.tool_calls() if c.end_ns] == [("sh -c exit 5 # after", 5)]
        )
        time.sleep(0.3)
        assert len(daemon.tool_calls()) == 1
    finally:
        cgroup.close()
        daemon.close()
