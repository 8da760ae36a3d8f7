"""Agents inside tool calls: they stay apart, and are never stopped or ended for the budget of the call they are in."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from equipoise.tests.fixtures.running_daemon import eventually
from equipoise.tests.fixtures.scripted_agent import GROW, Conversation, Model, Scripted

pytestmark = pytest.mark.kernel

# Speaks to its model, holds more than any call may, makes two calls of its own.
INNER = """
import socket, subprocess, sys, time
held = bytearray(b'x' * (int(sys.argv[2]) << 20))
time.sleep(float(sys.argv[3]))
s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.sendall(b'x'); s.recv(1)
time.sleep(0.4)
more = bytearray(b'x' * (120 << 20))
for words in (['bash', '-c', 'expr 40 + 1'], ['git', '--version'], ['bash', '-c', 'expr 40 + 2']):
    subprocess.run(words, stdout=-1, start_new_session=words[0] == 'bash')
print('inner has ended well')
"""


def outer(agent) -> Scripted:
    ada: Scripted = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    return ada


def program(folder: Path, name: str) -> str:
    path = folder / name
    path.write_text(f"#!{sys.executable} -S\n{INNER}")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("mib", [1, 120], ids=["it speaks first", "it meets the budget first"])
@pytest.mark.parametrize("shell", ["{}", "{}; expr 30 + 3"], ids=["the whole call", "a part of the call"])
def test_a_known_agent_in_a_call_lives_and_its_calls_are_calls(agent, model, tmp_path, shell, mib):
    ada = outer(agent)
    inner = f"{program(tmp_path, 'opencode')} {model.port} {mib} 0.3"
    ada.do(f"said = run('bash', '-c', {shell.format(inner)!r}).stdout; assert b'ended well' in said, said")
    eventually(lambda: {c.phase for c in ada.calls()} == {"ended"})
    calls = ada.calls()
    assert "opencode" in calls[0].command and calls[0].exit_code == 0 and not calls[0].actions, calls[0]
    # By the ways of its own profile: its git is housekeeping. What follows it in the call is a part of that.
    assert [c.command for c in calls[1:]] == ["expr 40 + 1", "expr 40 + 2"]
    assert calls[1].hard_bytes > 0 and calls[0].end_ns > calls[2].end_ns
    ada.do("run('expr', '50')")
    eventually(lambda: ada.calls()[-1].command == "expr 50")


def test_the_rest_of_a_call_keeps_its_budget(agent, model, tmp_path):
    ada = outer(agent)
    grow = f'{sys.executable} -S -c "{GROW.format(mib=160, seconds=20)}"'
    inner = f"{program(tmp_path, 'opencode')} {model.port} 1 0"
    script = f"{inner} & sleep 1.5; {grow}"
    ada.do(f"run('bash', '-c', {script!r})")
    eventually(lambda: ada.calls() and ada.calls()[0].phase == "ended")
    assert ada.calls()[0].signal == 9 or any("end the tool call" in a for a in ada.calls()[0].actions)


def test_a_script_of_a_call_that_speaks_to_an_engine_of_ours_is_an_agent_and_curl_is_not(agent, model: Model):
    ada = outer(agent)
    conversation = Conversation(ada.daemon, model)
    try:
        code = INNER.replace("(['git', '--version'])", "")
        ada.do(
            f"said = run({sys.executable!r}, '-S', '-c', {code!r}, '{model.port}', '1', '0').stdout; assert said, said"
        )
        eventually(lambda: len([c for c in ada.calls() if c.command.startswith("bash -c expr 40")]) == 2)
        assert ada.calls()[0].exempt and ada.calls()[0].exit_code == 0
        ada.do(f"run('curl', '-s', '-m', '1', 'http://127.0.0.1:{model.port}/')")
        call = eventually(lambda: next((c for c in ada.calls() if c.command.startswith("curl")), None))
        assert not call.exempt
    finally:
        conversation.close()


def test_who_speaks_to_somebody_else_in_a_call_has_the_budget_of_the_call(agent, model):
    ada = outer(agent)
    code = INNER.replace("more =", "time.sleep(20); more =").replace("held = bytearray", "held = bytearray")
    grows = code.replace("time.sleep(0.4)", GROW.format(mib=160, seconds=20))
    ada.do(f"assert run({sys.executable!r}, '-S', '-c', {grows!r}, '{model.port}', '1', '0').returncode == -9")
    assert ada.calls()[0].signal == 9


def test_an_agent_that_another_starts_without_a_call_is_judged_by_its_own_ways(agent, model, tmp_path):
    ada = outer(agent)
    inner = program(tmp_path, "opencode")
    ada.do(f"said = run({inner!r}, '{model.port}', '1', '0.3').stdout; assert b'ended well' in said, said")
    ada.do("run('expr', '60')")
    eventually(lambda: [c.command for c in ada.calls()] == ["expr 40 + 1", "expr 40 + 2", "expr 60"])
    time.sleep(0.1)
