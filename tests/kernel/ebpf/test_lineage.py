"""Which processes belong to which tool call, on the running kernel."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from equipoise.policies.events import EventsLost, ProcessExeced, ToolCallEnded

from .conftest import SANDBOX

pytestmark = pytest.mark.kernel
MIB = 1 << 20


def test_an_exec_under_an_agent_is_a_tool_call_with_its_command_line(bench):
    agent, tag = bench.agent("run('import sys; sys.exit(7)', 'with blanks')")
    bench.finish(agent)
    (call,) = bench.started()
    bench.wait(lambda: bench.gone(call.id), "the end of the tool call")
    assert call.sandbox == 4242
    assert call.command.endswith("-S -c import sys; sys.exit(7) with blanks")
    assert call.id != tag and call.id > 0
    ended = bench.ended(call.id)
    assert (ended.exit_code, ended.signal, ended.escaped_count) == (7, None, 0)


def test_each_exec_of_the_agent_is_a_tool_call_of_its_own(bench):
    agent, _ = bench.agent("for n in range(5): run(f'import sys; sys.exit({n})')")
    bench.finish(agent)
    calls = bench.started()
    assert len({call.id for call in calls}) == 5
    assert [bench.ended(call.id).exit_code for call in calls] == [0, 1, 2, 3, 4]


def test_execs_inside_a_tool_call_belong_to_it(bench):
    agent, _ = bench.agent("subprocess.run(['sh', '-c', 'true; sh -c \"ls / > /dev/null; true\"; true'])")
    bench.finish(agent)
    (call,) = bench.started()
    assert call.command.startswith("sh -c true; sh -c")


def test_execs_inside_a_tool_call_are_reported_on_request(make_bench):
    bench = make_bench(report_child_execs=True)
    agent, _ = bench.agent("subprocess.run(['sh', '-c', 'true; uname -r > /dev/null; true'])")
    bench.finish(agent)
    (call,) = bench.started()
    assert [(e.id, e.command) for e in bench.events if isinstance(e, ProcessExeced)] == [(call.id, "uname -r")]


def test_a_setsid_double_fork_keeps_the_tag_and_counts_as_escaped(bench):
    daemonize = (
        "import os, time\nif os.fork(): os.wait(), os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(30)"
    )
    agent, _ = bench.agent(f"run({daemonize!r}); os.read(0, 1)")
    bench.wait(lambda: bench.started() and bench.ended(bench.started()[0].id), "the end of the tool call's root")
    call = bench.started()[0]
    assert bench.ended(call.id).escaped_count == 1
    (escapee,) = bench.tools.processes(call.id)
    with open(f"/proc/{escapee}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    assert int(fields[1]) != agent.pid, "it has another parent by now"
    assert int(fields[3]) != os.getsid(0), "and a session of its own"
    assert bench.tools.tag_of(escapee) == call.id
    assert not bench.gone(call.id)
    assert bench.tools.kill(call.id) >= 1
    bench.wait(lambda: bench.gone(call.id), "the end of the escapee")
    assert agent.poll() is None, "the agent itself was not touched"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("vfork", "subprocess._USE_VFORK = True; subprocess.run([PYTHON, '-S', '-c', 'pass'])"),
        ("fork", "subprocess.run([PYTHON, '-S', '-c', 'pass'], preexec_fn=lambda: None)"),
        ("posix_spawn", "os.waitpid(os.posix_spawn(PYTHON, [PYTHON, '-S', '-c', 'pass'], {}), 0)"),
        (
            "a thread",
            "import threading; t = threading.Thread(target=run, args=('pass',)); t.start(); t.join()",
        ),
    ],
)
def test_a_tool_call_started_by(bench, how, code):
    agent, tag = bench.agent(code + "\nos.read(0, 1)")
    bench.wait(lambda: bench.started() and bench.gone(bench.started()[0].id), f"a tool call by {how}")
    assert len(bench.started()) == 1
    assert bench.tools.processes(tag) == (agent.pid,)
    # A vfork child shared the agent's memory; its exec must not have taken that away from the agent.
    assert bench.tools.usage(tag).used_bytes > 2 << 20


def test_forks_of_the_agent_that_do_not_exec_stay_the_agent(bench):
    agent, tag = bench.agent(
        """
        child = os.fork()
        if child == 0:
            time.sleep(30)
        os.read(0, 1)
        """
    )
    bench.wait(lambda: len(bench.tools.processes(tag)) == 2, "the agent's fork")
    assert bench.started() == []
    assert bench.tools.kill(tag) >= 2
    bench.finish(agent)


def test_an_agent_that_execs_itself_stays_the_agent(bench):
    agent, _tag = bench.agent(
        """
        os.execv('/usr/bin/env', ['env', 'X=1', 'sh', '-c', f'exec {PYTHON} -S -c "import os; os.system(\\'true\\')"'])
        """
    )
    bench.finish(agent)
    (call,) = bench.started()
    assert call.command == "sh -c true", "neither env nor the interpreter that it became is a tool call"


def test_threads_of_an_agent_registered_late_are_followed(bench):
    child = bench.waiting(
        """
        import threading
        threads = [threading.Thread(target=lambda: (time.sleep(0.6), run('pass'))) for _ in range(3)]
        for t in threads: t.start()
        print('ready', flush=True)
        for t in threads: t.join()
        """
    )
    bench.release(child)
    assert child.stdout.readline() == b"ready\n"
    bench.tools.register_agent(child.pid, 1)
    bench.finish(child)
    assert len(bench.started()) == 3


def test_a_process_handed_over_by_a_hook_becomes_a_tool_call(bench):
    agent, tag = bench.agent(
        """
        child = os.fork()
        if child == 0:
            kept = bytearray(40 << 20)
            print(os.getpid(), flush=True)
            os.read(0, 1)
            os._exit(3)
        os.waitpid(child, 0)
        """
    )
    pid = int(agent.stdout.readline())
    assert bench.tools.usage(tag).used_bytes > 40 << 20
    call = bench.tools.begin_tool(pid, 4242)
    assert bench.tools.usage(call).used_bytes >= 40 << 20, "what it held moves with it"
    assert bench.tools.usage(tag).used_bytes < 40 << 20
    assert (bench.tools.processes(call), bench.tools.processes(tag)) == ((pid,), (agent.pid,))
    agent.stdin.write(b"y")
    agent.stdin.flush()
    bench.wait(lambda: bench.gone(call), "its end")
    assert bench.ended(call).exit_code == 3


def test_tagging_a_process_that_is_gone_says_so(bench):
    child = bench.waiting("pass")
    bench.release(child)
    child.wait()
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        bench.tools.register_agent(child.pid, 1)
    assert bench.tools.tags() == ()


def test_a_process_that_is_dead_and_not_yet_waited_for_is_taken_into_no_call(bench):
    """Its exit has been counted: it would be in the call for ever."""
    agent, _ = bench.agent("tool('import time; time.sleep(30)').wait()")
    bench.wait(bench.started, "the tool call")
    call, dead = bench.started()[0].id, bench.waiting("pass")
    bench.release(dead)
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError, match=str(dead.pid)):
        bench.tools.adopt(dead.pid, call)
    dead.wait()
    assert bench.tools.usage(call).process_count == 1
    bench.tools.kill(call)
    bench.finish(agent)
    bench.wait(lambda: bench.gone(call), "the call's last process")


def test_a_killed_tool_call_reports_its_signal(bench):
    agent, _ = bench.agent("tool('import time; time.sleep(30)').wait(); print('agent lives')")
    bench.wait(bench.started, "the tool call")
    call = bench.started()[0]
    bench.tools.kill(call.id)
    assert bench.finish(agent) == "agent lives\n"
    ended = bench.ended(call.id)
    assert (ended.exit_code, ended.signal) == (None, 9)


def test_records_are_given_back_when_tool_calls_are_gone(make_bench):
    bench = make_bench(tool_slots=4)
    agent, _ = bench.agent("for n in range(20): run('pass'); time.sleep(0.02)")
    bench.finish(agent)
    assert len(bench.started()) == 20
    assert dict(bench.tools.losses().untracked)["no_slot"] == 0


def test_without_a_free_record_the_tool_call_is_counted_and_known_as_soon_as_there_is_one(make_bench):
    bench = make_bench(tool_slots=2)
    child = "import subprocess, sys; subprocess.call([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    agent, tag = bench.agent(
        "a = tool('import time; time.sleep(60)'); print(a.pid, flush=True); os.read(0, 1)\n"
        f"b = tool({child!r}, 'second'); print(b.pid, flush=True); b.wait()",
        hard_bytes=100 * MIB,
    )
    first = int(agent.stdout.readline())
    bench.wait(bench.started, "the record's taker")  # a parent may go on before its child's exec is told
    bench.release(agent)
    second = int(agent.stdout.readline())
    bench.wait(lambda: bench.tools.unrecorded_count == 1, "that there is none is known")
    assert dict(bench.tools.losses().untracked)["no_slot"] == 1, "its child's exec is no call of its own"
    assert [call.pid for call in bench.started()] == [first]
    assert sum(e.count for e in bench.events if isinstance(e, EventsLost)) == 1
    os.kill(first, signal.SIGKILL)
    bench.wait(lambda: len(bench.started()) > 1, "it is taken in")
    call = bench.started()[1]
    assert (call.pid, call.agent, call.hard_bytes, call.sandbox) == (second, tag, 100 * MIB, SANDBOX)
    assert call.command.endswith(" second")
    assert len(bench.tools.processes(call.id)) == 2, "with its child"
    assert bench.tools.unrecorded_count == 0


def test_no_record_is_lost_when_the_beginning_and_the_end_of_calls_were(make_bench):
    bench = make_bench(ring_bytes=4096, tool_slots=8)
    agent, tag = bench.agent(
        "for n in range(7): run('pass')\nprint('now', flush=True); os.read(0, 1)\n"
        "more = [tool('import time; time.sleep(60)') for n in range(7)]\nprint('more', flush=True); os.read(0, 1)"
    )
    assert agent.stdout.readline() == b"now\n"
    assert dict(bench.tools.losses().events)["tool_gone"] > 0
    bench.settle()
    assert bench.tools.tags() == (tag,)
    assert {call.id for call in bench.started()} == {e.id for e in bench.events if isinstance(e, ToolCallEnded)}
    bench.release(agent)
    assert agent.stdout.readline() == b"more\n"
    bench.wait(lambda: len(bench.tools.tags()) == 8, "all seven records are there again")
    assert dict(bench.tools.losses().untracked)["no_slot"] == 0


def test_nothing_is_followed_outside_registered_agents(bench):
    child = bench.waiting("run('pass')")
    bench.release(child)
    bench.finish(child)
    assert bench.events == []
    assert bench.tools.tag_of(os.getpid()) is None


def test_the_agents_record_is_given_back_when_its_last_fork_becomes_a_tool_call(bench):
    agent, tag = bench.agent(
        """
        if os.fork(): os._exit(0)
        time.sleep(0.2)
        os.execv(PYTHON, [PYTHON, '-S', '-c', 'import time; time.sleep(30)'])
        """
    )
    bench.wait(lambda: agent.poll() is not None and bench.started(), "the fork's exec")
    bench.tick()
    assert bench.tools.tags() == (bench.started()[0].id,)
    assert bench.tools.usage(tag) is None
    bench.tools.kill(bench.started()[0].id)


def test_a_tool_call_taken_over_by_a_hook_ends_under_its_first_tag(bench):
    agent, _ = bench.agent("tool('import time; time.sleep(30)').wait()")
    bench.wait(bench.started, "the tool call")
    found = bench.started()[0]
    taken = bench.tools.begin_tool(found.pid, 4242)
    bench.wait(lambda: bench.gone(found.id), "the end of the first tag")
    assert bench.tools.processes(taken) == (found.pid,)
    assert bench.tools.usage(found.id) is None
    bench.tools.kill(taken)
    bench.finish(agent)
    assert bench.ended(taken).signal == 9


def test_hundreds_of_short_processes_leave_no_trace_in_the_books(bench):
    churn = "for n in $(seq 60); do (true | /bin/true; /bin/true &) ; done; wait"
    agent, _ = bench.agent(
        f"ts = [subprocess.Popen(['sh', '-c', {churn!r}]) for _ in range(4)]; [t.wait() for t in ts]"
    )
    bench.finish(agent)
    bench.wait(lambda: not bench.tools.tags(), "the last process")
    assert len(bench.started()) == 4
    assert bench.tools.followed_count() == (0, 0)
    assert bench.tools.losses().events_count == 0
    assert all(count == 0 for _, count in bench.tools.losses().untracked)


def test_an_exit_that_no_program_saw_is_found_by_the_dead_process(bench):
    agent, _ = bench.agent("tool('import os; os.read(0, 1)'); os.read(0, 1)")
    bench.wait(bench.started, "the tool call")
    call = bench.started()[0]
    for link in bench.tools._probes._links[:]:  # nothing less than all programs missing it is a missed exit
        link.destroy()
    os.kill(call.pid, 9)
    bench.wait(lambda: Path(f"/proc/{call.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z", "its death")
    bench.tick()
    assert bench.tools.processes(call.id) == (call.pid,)
    bench.events += bench.tools.bury()
    bench.tick()
    ended = bench.ended(call.id)
    assert (ended.exit_code, ended.signal) == (None, None), "nobody saw how it ended"
    assert bench.gone(call.id)
    assert bench.tools.usage(call.id) is None
    assert agent.poll() is None, "the living are left alone"
    assert agent.pid in [pid for tag in bench.tools.tags() for pid in bench.tools.processes(tag)]


def test_below_what_may_become_the_agent_every_exec_has_a_record_of_its_own(bench):
    agent, tag = bench.agent("subprocess.run(['sh', '-c', 'true; uname -r > /dev/null; true'])", starting=True)
    bench.finish(agent)
    shell, inner = bench.started()
    assert (shell.agent, inner.agent, inner.command) == (tag, shell.id, "uname -r")


def test_what_a_call_execs_is_its_own_once_it_is_known_for_one(bench):
    code = "subprocess.run(['sh', '-c', 'read -r _; uname -r > /dev/null; true'])"
    agent, _ = bench.agent(code, starting=True)
    bench.wait(bench.started, "the call's start")
    (call,) = bench.started()
    bench.tools.set_starting(call.id, False)
    agent.stdin.write(b"\n")
    agent.stdin.flush()
    bench.finish(agent)
    assert [started.id for started in bench.started()] == [call.id]


def test_a_root_that_becomes_another_program_says_so(bench):
    agent, _ = bench.agent("subprocess.run(['env', 'X=1', 'uname', '-r'], stdout=subprocess.DEVNULL)")
    bench.finish(agent)
    (call,) = bench.started()
    assert [(e.id, e.command) for e in bench.events if isinstance(e, ProcessExeced)] == [(call.id, "uname -r")]
