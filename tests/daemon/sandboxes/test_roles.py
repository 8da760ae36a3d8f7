"""Who is who, on the real kernel and a real daemon: launchers, relaunches, shells, services, what speaks to a model.

The agents here are scripts of our own; real ones are in tests/agents. None is registered as `direct`: what may be the
agent must be found out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from equipoise.daemon.api.v1 import policy_pb2
from equipoise.gpuctl.api.v1 import engine_pb2, engine_pb2_grpc
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon, eventually

pytestmark = pytest.mark.kernel

POLICY = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: roles}
spec:
  tenants: {gold: {weight: 1}}
  memory:
    toolPool: 4GiB
    budget: {soft: 48MiB, hard: 64MiB, step: 32MiB, max: 96MiB}
    maxWait: 1s
  roles:
    - {match: "my-dev-server", role: service}
"""

# Speaks to "a model", then does what it is told on standard input, one Python statement a line.
AGENT = """
import os, socket, subprocess, sys, time
port = int(sys.argv[1])
def run(*argv, **options):
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)
def speak():
    global held
    held = socket.create_connection(("127.0.0.1", port))
    held.sendall(b"x"); held.recv(1)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
GROW = "held = [bytearray(b'x' * (8 << 20)) for _ in range({mib} // 8)]; import time; time.sleep({seconds})"


class Model(threading.Thread):
    """Accepts connections and answers each with one byte."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.open.append(connection)
                connection.recv(1)
                connection.sendall(b"y")

    def close(self) -> None:
        self.listener.close()
        for each in self.open:
            each.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[RunningDaemon]:
    running = RunningDaemon(tmp_path_factory.mktemp("roles"), POLICY)
    try:
        running.start()
        if not running.status().probe_backend.startswith("libbpf"):
            pytest.skip(f"no probes here: {running.status().probe_backend}")
        yield running
    finally:
        running.close()


@pytest.fixture
def model() -> Iterator[Model]:
    answering = Model()
    answering.start()
    yield answering
    answering.close()


class Scripted:
    """The agent above, behind whatever launches it."""

    def __init__(self, daemon: RunningDaemon, model: Model, name: str, *launcher: str) -> None:
        self.daemon, self.name = daemon, name
        argv = [sys.executable, "-S", "-u", "-c", AGENT, str(model.port)]
        if launcher[:2] == ("sh", "-c"):
            script = subprocess.list2cmdline([sys.executable, "-S", "-u"]) + ' -c "$AGENT" ' + f"{model.port}; echo end"
            argv = ["sh", "-c", script]
        else:
            argv = [*launcher, *argv]
        self.process = subprocess.Popen(
            [*CLI, "run", "--tenant", "gold", "--name", name, "--", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "EQUIPOISE_SOCKET": str(daemon.socket), "AGENT": AGENT},
        )

    def do(self, statement: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def calls(self) -> list[policy_pb2.ToolCallView]:
        return [c for c in self.daemon.tool_calls() if c.sandbox == self.name]

    def roles(self) -> dict[str, str]:
        return {p.command: p.role for p in self.daemon.watch().processes if p.sandbox == self.name}

    def end(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def agent(daemon, model, request) -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(*launcher: str) -> Scripted:
        started.append(Scripted(daemon, model, f"a{len(started)}-{abs(hash(request.node.nodeid)) % 10**8}", *launcher))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


@pytest.mark.parametrize("launcher", [(), ("timeout", "90"), ("env", "X=1"), ("sh", "-c"), ("nice", "nohup")])
def test_behind_any_launcher_the_agent_is_the_agent_and_its_children_are_its_calls(agent, launcher):
    ada = agent(*launcher)
    ada.do("run('true')")
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    ada.do("run('expr', '1', '+', '1')")
    ada.do("run('sh', '-c', 'ls / | wc -l')")
    assert [c.command for c in ada.calls()] == ["expr 1 + 1", "sh -c ls / | wc -l"]
    ada.process.stdin.close()
    assert ada.process.wait(20) == 0
    eventually(lambda: ada.name not in {s.name for s in ada.daemon.watch().sandboxes})


def test_before_it_has_spoken_nothing_below_it_is_stopped_or_ended(agent):
    ada = agent("timeout", "90")
    ada.do(f"run(sys.executable, '-S', '-c', {GROW.format(mib=160, seconds=1.5)!r}).check_returncode()")
    assert ada.calls() == []


def test_the_agent_itself_is_never_stopped_however_it_grows(agent):
    ada = agent("sh", "-c")
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    ada.do("held_memory = bytearray(b'x' * (200 << 20))")
    ada.do("run('true')")
    assert [c.command for c in ada.calls()] == ["true"]


def test_once_it_has_spoken_a_call_meets_its_budget_and_ends_alone(agent):
    ada = agent("env", "X=1")
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    ada.do(f"assert run(sys.executable, '-S', '-c', {GROW.format(mib=160, seconds=20)!r}).returncode == -9")
    (call,) = ada.calls()
    assert call.signal == 9 and any("end the tool call" in a or "kill" in a for a in call.actions), call.actions
    ada.do("run('true')")


def test_a_relaunch_that_speaks_later_is_the_agent_and_not_a_call_of_its_first_self(agent, model):
    ada = agent()
    relaunch = (
        "import socket, subprocess, sys, time; time.sleep(0.3); "
        f"s = socket.create_connection(('127.0.0.1', {model.port})); s.sendall(b'x'); s.recv(1); time.sleep(0.5); "
        "held = bytearray(b'x' * (160 << 20)); print(subprocess.run(['expr', '2', '+', '2'], stdout=-1).stdout)"
    )
    ada.do(f"assert b'4' in run(sys.executable, '-S', '-c', {relaunch!r}).stdout")
    assert [c.command for c in ada.calls()] == ["expr 2 + 2"]


def test_a_persistent_shell_is_part_of_the_agent_and_each_line_in_it_is_a_call_that_ends_alone(agent):
    ada = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    ada.do("sh = subprocess.Popen(['bash', '--norc'], stdin=-1, stdout=-1, text=True, bufsize=1)")
    eventually(lambda: ada.roles().get("bash --norc") == "shell")
    ada.do("sh.stdin.write('cd /tmp; MARK=kept\\nexpr 3 + 3\\n'); assert sh.stdout.readline() == '6\\n'")
    ada.do("time.sleep(0.2); sh.stdin.write('sleep 0.3 | cat | wc -l; echo $?\\n')")
    ada.do("sh.stdout.readline(); sh.stdout.readline()")
    line = f'{sys.executable} -S -c "{GROW.format(mib=160, seconds=20)}"; echo rc=$?\n'
    ada.do(f"time.sleep(0.2); sh.stdin.write({line!r})")
    ada.do("line = sh.stdout.readline(); assert line == 'rc=137\\n', line")
    ada.do("sh.stdin.write('echo $MARK $PWD\\n'); assert sh.stdout.readline() == 'kept /tmp\\n'")
    commands = [c.command for c in ada.calls()]
    assert commands[0] == "expr 3 + 3" and len(commands) == 3, commands
    assert commands[1] in ("sleep 0.3", "cat", "wc -l") and "bytearray" in commands[2]


def test_a_server_and_what_the_operator_calls_one_are_services_and_no_calls(agent, tmp_path):
    ada = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    for name in ("my-dev-server", "mcp-server-files"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexec sleep 30\n")
        program.chmod(0o755)
        ada.do(f"kept = [*globals().get('kept', []), subprocess.Popen([{str(program)!r}], stdin=-1, stdout=-1)]")
    eventually(lambda: list(ada.roles().values()).count("service") == 2)
    assert ada.calls() == []
    ada.do("[k.kill() for k in kept]")


def test_git_that_connects_before_the_agent_does_is_not_the_agent(agent, model):
    ada = agent()
    fake = Path(ada.daemon.folder) / "git"
    fake.write_text(f"#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/{model.port}; echo x >&3; sleep 0.3\n")
    fake.chmod(0o755)
    ada.do(f"run({str(fake)!r}, 'fetch')")
    assert "runtime" not in ada.roles().values()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())


def test_said_to_be_direct_the_first_call_counts_at_once(daemon):
    bo = daemon.agent("gold", "direct-one")
    assert bo.call("expr", "4", "+", "4").returncode == 0
    assert [c.command for c in daemon.tool_calls("expr 4 + 4")] == ["expr 4 + 4"]
    bo.leave()


class Conversation:
    """An engine that says what it is told to, when it is told to, of a session on the agent's connection."""

    def __init__(self, daemon: RunningDaemon, model: Model) -> None:
        self._reports: queue.Queue[engine_pb2.EngineReport | None] = queue.Queue()
        self._address, self._port = model.open[-1].getpeername()
        hello = engine_pb2.EngineHello(
            engine_id="told", kind="test", listen_addresses=[f"127.0.0.1:{model.port}"], pid=os.getpid()
        )
        self._report(time.monotonic_ns(), hello=hello)
        self._stream = engine_pb2_grpc.EngineServiceStub(daemon.channel).Attach(iter(self._reports.get, None))
        eventually(lambda: any(e.engine_id == "told" and e.attached for e in daemon.watch().engines))

    def _report(self, at_ns: int, **report: Any) -> None:
        self._reports.put(engine_pb2.EngineReport(at_ns=at_ns, **report))

    def start_turn(self) -> None:
        turn = engine_pb2.TurnStarted(
            session_id="talk", tenant_id="gold", turn_id="t", peer_address=self._address, peer_port=self._port
        )
        self._report(time.monotonic_ns(), turn_started=turn)

    def end_turn(self, at_ns: int, **asked: str) -> None:
        calls = [engine_pb2.AskedToolCall(call_id=i, name="shell", command=command) for i, command in asked.items()]
        ended = engine_pb2.TurnEnded(
            session_id="talk",
            tenant_id="gold",
            turn_id="t",
            finish_reason=engine_pb2.FINISH_REASON_TOOL_CALLS,
            asked=calls,
        )
        self._report(at_ns, turn_ended=ended)

    def close(self) -> None:
        self._reports.put(None)
        self._stream.cancel()


@pytest.fixture
def spoken(agent, model) -> Iterator[tuple[Scripted, Conversation]]:
    """An agent that has spoken, and its conversation."""
    ada = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    conversation = Conversation(ada.daemon, model)
    yield ada, conversation
    conversation.close()


def test_what_was_asked_for_is_the_call_though_the_kernel_was_heard_before_the_conversation(spoken):
    ada, conversation = spoken
    conversation.start_turn()
    asked_ns = time.monotonic_ns()
    ada.do("run('git', '--version'); run('bash', '-c', 'cd / && echo one')")
    ada.do("stays = subprocess.Popen(['sleep', '30'])")
    assert len(ada.calls()) == 3, "nobody has said anything yet"
    conversation.end_turn(asked_ns, one="echo one")
    eventually(lambda: [(c.agent_call_id, c.command) for c in ada.calls()] == [("one", "echo one")])
    assert "housekeeping" in [r for command, r in ada.roles().items() if command == "sleep 30"]

    conversation.start_turn()
    asked_ns = time.monotonic_ns()
    ada.do("run('bash', '-c', 'cd / && expr 1 + 1; exit 3'); run('git', '--version')")
    ada.do("works = subprocess.Popen(['bash', '-c', 'cd / && sleep 31'])")
    time.sleep(0.3)
    assert len(ada.calls()) == 1, "nothing of the kind was asked for, as far as anybody knows"
    conversation.end_turn(asked_ns, two="expr 1 + 1; exit 3", three="sleep 31")
    eventually(lambda: [c.agent_call_id for c in ada.calls()] == ["one", "two", "three"])
    _, two, three = ada.calls()
    assert (two.exit_code, two.phase, three.phase) == (3, "ended", "running")
    assert three.hard_bytes > 0 and two.confidence > 0.98 and three.session_id == "talk"
    ada.do("works.kill(); works.wait(); stays.kill(); stays.wait()")
    eventually(lambda: {c.phase for c in ada.calls()} == {"ended"})
    eventually(lambda: "housekeeping" not in ada.roles().values())
    listed = ada.daemon.cli("ps", "--all").stdout
    assert "git --version" not in listed
