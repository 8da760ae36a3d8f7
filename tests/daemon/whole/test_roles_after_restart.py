"""After kill -9 of the daemon, below an agent that its launcher hides: who was what is found out again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from equipoise.daemon.observe.journal import JournalReader
from equipoise.daemon.sandboxes.processes import boot_id
from equipoise.tests.daemon.sandboxes.test_lines import SHELL
from equipoise.tests.fixtures.running_daemon import RunningDaemon, eventually, with_probes
from equipoise.tests.fixtures.scripted_agent import GROW, POLICY, Model, Scripted

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture
def daemon(tmp_path) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path, policy=POLICY) as running:
        yield running


@pytest.fixture
def ada(daemon) -> Iterator[Scripted]:
    model = Model()
    model.start()
    agent = Scripted(daemon, model, "ada")
    yield agent
    if agent.process.poll() is None:
        agent.process.kill()
        agent.process.communicate()
    model.close()


def restart(daemon: RunningDaemon) -> None:
    daemon.kill()
    daemon.start()


@pytest.mark.parametrize("shell", [("bash", "--norc"), ("dash",)], ids=lambda argv: argv[0])
def test_a_persistent_shell_is_one_again_and_each_line_in_it_a_call_that_ends_alone(daemon, ada, shell):
    ada.do("speak()")
    ada.do(f"exec({SHELL!r}, globals()); shell(*{shell!r})")
    eventually(lambda: "shell" in ada.roles().values(), shown=ada.roles)
    ada.do("feed('MARK=kept')")
    restart(daemon)
    eventually(lambda: "shell" in ada.roles().values(), shown=ada.roles)
    ada.do("feed('expr 2; sleep 0.1; expr 3')")
    ada.do("feed('expr 4')")
    eventually(lambda: [c.command for c in ada.calls()] == ["expr 2", "expr 4"], shown=ada.calls)
    grow = f'{sys.executable} -S -c "{GROW.format(mib=160, seconds=20)}"; echo rc=$? $MARK'
    ada.do(f"assert 'rc=137 kept' in feed({grow!r})")
    eventually(lambda: [c.signal for c in ada.calls()][2:] == [9], shown=ada.calls)
    ada.do("sh.stdin.close(); sh.wait()")


def inner_agent(folder: Path, port: int) -> tuple[str, Path]:
    """An agent of a known name that holds more than a call may, and makes a call before and after the gate opens."""
    gate, path = folder / "gate", folder / "opencode"
    path.write_text(
        f"#!{sys.executable} -S\n"
        "import os, socket, subprocess, time\n"
        "def call(text): subprocess.run(['bash', '-c', text], stdout=-1, start_new_session=True)\n"
        f"s = socket.create_connection(('127.0.0.1', {port})); s.sendall(b'x'); s.recv(1); time.sleep(0.4)\n"
        "held = bytearray(b'x' * (120 << 20))\n"
        f"call('expr 40 + 1; while [ ! -e {gate} ]; do sleep 0.05; done; exit 5')\n"
        "more = bytearray(b'x' * (120 << 20)); call('expr 40 + 2')\n"
    )
    path.chmod(0o755)
    return str(path), gate


@pytest.mark.parametrize("line", ["{}", "{}; expr 30 + 3"], ids=["the whole call", "a part of the call"])
def test_an_agent_in_a_call_is_one_again_and_its_calls_are_calls(daemon, ada, tmp_path, line):
    inner, gate = inner_agent(tmp_path, ada.port)
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    ada.do(f"call = subprocess.Popen(['bash', '-c', {line.format(inner)!r}], stdout=-1)")
    eventually(lambda: len(ada.calls()) == 2, shown=ada.calls)
    before = [(c.tool_call_id, c.command) for c in ada.calls()]
    with JournalReader(daemon.state / "journal.sqlite") as journal:
        eventually(lambda: len(journal.open_calls(boot_id())) == 2)
    restart(daemon)
    eventually(lambda: list(ada.roles().values()).count("runtime") + sum(c.exempt for c in ada.calls()) >= 2)
    assert [(c.tool_call_id, c.command) for c in ada.calls()] == before
    gate.touch()
    ada.do("assert call.wait() == 0, call.returncode")
    eventually(lambda: {c.phase for c in ada.calls()} == {"ended"}, shown=ada.calls)
    calls = ada.calls()
    assert [c.exit_code for c in calls] == [0, 5, 0], calls
    assert calls[2].command == "expr 40 + 2" and calls[2].hard_bytes > 0 and not calls[0].actions
