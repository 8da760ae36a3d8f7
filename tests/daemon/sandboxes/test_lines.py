"""Command lines of persistent shells, under a real daemon: one line, one call, however it is written."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator

import pytest
from equipoise.daemon.sandboxes.evidence import can_be_fed, input_of, waits_for_input
from equipoise.tests.fixtures.running_daemon import MIB, eventually, process_state
from equipoise.tests.fixtures.scripted_agent import GROW, Scripted

pytestmark = pytest.mark.kernel
SHELL = """
def shell(*argv, stdin=-1):
    global sh, number
    number = 0
    sh = subprocess.Popen(argv, stdin=stdin, stdout=-1, stderr=-3, text=True, bufsize=1)
def feed(text):
    global number
    number += 1
    sh.stdin.write(f'{text}\\necho said-{number}\\n'); sh.stdin.flush()
    said = []
    while f'said-{number}' not in (got := sh.stdout.readline()):
        assert got, said
        said.append(got)
    return ''.join(said)
"""

TERMINAL = """
def terminal(*argv):
    global pid, screen
    import pty
    pid, screen = pty.fork()
    if pid == 0:
        os.environ.update(TERM='dumb', PS1='$ ')
        os.execvp(argv[0], argv)
def enter(text, answer):
    import select
    os.write(screen, (text + '\\r').encode())
    said = b''
    while answer.encode() not in said:
        assert select.select([screen], [], [], 20)[0], said
        said += os.read(screen, 4096)
"""


@pytest.fixture(params=[("bash", "--norc"), ("dash",)], ids=lambda argv: argv[0])
def ada(agent, request) -> Iterator[Scripted]:
    """An agent with a persistent shell."""
    made = agent()
    made.do("speak()")
    made.do(f"exec({SHELL!r}, globals())")
    eventually(lambda: "runtime" in made.roles().values())
    made.do(f"shell(*{request.param!r})")
    eventually(lambda: "shell" in made.roles().values())
    yield made
    made.do("sh.stdin.close(); sh.wait()")


def test_programs_one_after_another_in_one_line_are_one_call(ada):
    ada.do("feed('expr 1; sleep 0.15; expr 2')")
    ada.do("feed('for n in 3 4 5; do expr $n; done')")
    ada.do("feed('x=$(expr 6); expr $x + 1 | cat | wc -c')")
    ada.do("feed('(expr 7; (expr 8))')")
    eventually(lambda: [c.phase for c in ada.calls()] == ["ended"] * 4)
    calls = ada.calls()
    assert [c.command for c in calls] == ["expr 1", "expr 3", "expr 6", "expr 7"]
    assert 150e6 < calls[0].end_ns - calls[0].start_ns < 2e9


def test_a_line_lasts_as_long_as_its_shell_is_busy_with_it(ada):
    ada.do("sh.stdin.write('expr 1; sleep 1; expr 2\\n'); sh.stdin.flush(); time.sleep(0.4)")
    (call,) = ada.calls()
    assert call.phase == "running", "its first program has ended, its line has not"
    ada.do("[sh.stdout.readline() for _ in range(2)]")
    eventually(lambda: ada.calls()[0].phase == "ended")
    assert len(ada.calls()) == 1 and ada.calls()[0].exit_code == 0


def test_a_later_program_of_a_line_is_measured_and_meets_the_budget_of_the_call(ada):
    hold = "held = b'x' * (40 << 20); import time; time.sleep(0.3)"
    text = f'expr 1; {sys.executable} -S -c "{hold}"'
    ada.do(f"feed({text!r})")
    eventually(lambda: ada.calls()[0].phase == "ended")
    assert 38 * MIB < ada.calls()[0].peak_bytes < 60 * MIB
    grow = GROW.format(mib=160, seconds=20)
    text = f'cd /usr; expr 2; {sys.executable} -S -c "{grow}"; echo rc=$?'
    ada.do(f"assert 'rc=137' in feed({text!r})")
    eventually(lambda: [c.phase for c in ada.calls()] == ["ended"] * 2)
    killed = ada.calls()[1]
    assert killed.signal == 9 and any("end the tool call" in a or "kill" in a for a in killed.actions), killed.actions
    ada.do("assert feed('echo $PWD') == '/usr\\n'")


def test_what_a_line_leaves_in_the_background_is_its_own_and_the_next_line_another_call(ada):
    ada.do("feed('sleep 1.3 >/dev/null & expr 1')")
    eventually(lambda: ada.calls()[0].phase == "ended")
    ada.do("feed('expr 2')")
    first, second = eventually(lambda: len(ada.calls()) == 2 and ada.calls())
    assert first.escaped_count == 1 and second.command == "expr 2"
    ada.do("feed('(sleep 0.5; exec sleep 0.6) >/dev/null & true')")
    ada.do("feed('expr 3')")
    eventually(lambda: {c.phase for c in ada.calls()} == {"ended"} and len(ada.calls()) == 4)
    time.sleep(0.7)
    # The second program of what runs in the background is of its line, which began after the next one's even.
    assert {c.command for c in ada.calls()[2:]} == {"sleep 0.5", "expr 3"} and len(ada.calls()) == 4
    assert next(c for c in ada.calls() if c.command == "sleep 0.5").escaped_count == 1


def test_two_lines_in_one_request_are_one_call(ada):
    ada.do("feed('expr 1\\nexpr 2')")
    ada.do("feed('expr 3')")
    eventually(lambda: [c.command for c in ada.calls()] == ["expr 1", "expr 3"])


def test_a_line_of_builtins_is_a_call_where_its_conversation_asked_for_it(spoken):
    ada, conversation = spoken
    ada.do(f"exec({SHELL!r}, globals()); shell('bash', '--norc')")
    eventually(lambda: "shell" in ada.roles().values())
    for number, text in enumerate(("cd /usr", "export A=b", "expr 1; expr 2", "f() { expr 3; }; f")):
        conversation.start_turn()
        conversation.end_turn(time.monotonic_ns(), **{f"c{number}": text})
        ada.do(f"feed({text!r})")
    conversation.start_turn()
    eventually(lambda: [c.agent_call_id for c in ada.calls()] == ["c0", "c1", "c2", "c3"])
    assert [c.command for c in ada.calls()] == ["cd /usr", "export A=b", "expr 1; expr 2", "f() { expr 3; }; f"]
    assert {c.phase for c in ada.calls()} == {"ended"} and {c.session_id for c in ada.calls()} == {"talk"}
    ada.do("feed('git --version')")
    time.sleep(0.8)
    assert len(ada.calls()) == 4, "nobody asked for that"
    ada.do("sh.stdin.close(); sh.wait()")


@pytest.mark.parametrize("shell", [("bash", "--norc", "-i"), ("zsh", "-f", "-i")], ids=lambda argv: argv[0])
def test_each_line_typed_into_a_terminal_is_a_call(agent, shell):
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    ada = agent()
    ada.do("speak()")
    ada.do(f"exec({TERMINAL!r}, globals()); terminal(*{shell!r})")
    eventually(lambda: "shell" in ada.roles().values(), shown=ada.roles)
    for number in (1, 2):
        ada.do(f"enter('expr {number}00 + 5', '{number}05')")
    ada.do("enter('sh -c \"exit 4\"; echo $((40 + 2))', '42')")
    calls = eventually(lambda: len(ada.calls()) == 3 and all(c.end_ns for c in ada.calls()) and ada.calls())
    said = [(c.command, c.exit_code) for c in calls]
    assert said == [("expr 100 + 5", 0), ("expr 200 + 5", 0), ("sh -c exit 4", 4)]
    ada.do("os.kill(pid, 9)")


def test_a_script_on_standard_input_is_one_call_and_no_shell(agent, tmp_path):
    ada = agent()
    ada.do("speak()")
    eventually(lambda: "runtime" in ada.roles().values())
    script = tmp_path / "script.sh"
    script.write_text("expr 1\nsleep 0.1\nexpr 2\n")
    ada.do(f"subprocess.run(['bash'], stdin=open({str(script)!r}), stdout=-1)")
    eventually(lambda: [(c.command, c.phase) for c in ada.calls()] == [("bash", "ended")])


def test_a_line_ends_with_its_shell(ada):
    ada.do("sh.stdin.write('sleep 30\\n'); sh.stdin.flush()")
    (call,) = eventually(ada.calls)
    ada.do("sh.kill(); sh.wait()")
    eventually(lambda: ada.calls()[0].phase == "ended")
    os.kill(call.pid, 9)
    ada.do("shell('bash', '--norc')")


def test_what_waits_for_input_is_told_from_what_waits_for_a_child(spawn):
    reads = spawn("import os; os.read(0, 1); import time; time.sleep(60)")
    eventually(lambda: waits_for_input(reads.pid))
    assert can_be_fed(reads.pid) and input_of(reads.pid).startswith("pipe:")
    assert reads.stdin is not None
    reads.stdin.write(b"x")
    reads.stdin.flush()
    eventually(lambda: waits_for_input(reads.pid) is False)
    waits = spawn("import os\nif os.fork(): os.wait()\nelse: import time; time.sleep(1)")
    eventually(lambda: process_state(waits.pid) == "S")
    assert waits_for_input(waits.pid) is False
    reads.kill()
    reads.wait()
    assert waits_for_input(reads.pid) is None
