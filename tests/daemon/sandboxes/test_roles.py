"""Who is who, on the real kernel and a real daemon: launchers, relaunches, shells, services, what speaks to a model.

The agents here are scripts of our own; real ones are in tests/agents. None is registered as `direct`: what may be the
agent must be found out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from equipoise.tests.fixtures.running_daemon import eventually
from equipoise.tests.fixtures.scripted_agent import GROW

pytestmark = pytest.mark.kernel


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


def test_what_was_asked_for_is_the_call_though_the_kernel_was_heard_before_the_conversation(spoken):
    ada, conversation = spoken
    conversation.start_turn()
    asked_ns = time.monotonic_ns()
    ada.do("run('git', '--version'); run('bash', '-c', 'cd / && echo one')")
    ada.do("stays = subprocess.Popen(['sleep', '30'])")
    eventually(lambda: len(ada.calls()) == 3)  # nobody has said anything yet
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
