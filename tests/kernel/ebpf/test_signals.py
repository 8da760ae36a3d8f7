"""Who sent a tool call the signal that ended it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from equipoise.policies.events import ToolCallSignalled
from equipoise.tests.kernel.ebpf.conftest import PYTHON

pytestmark = pytest.mark.kernel


def signalled(bench) -> list[ToolCallSignalled]:
    return [event for event in bench.events if isinstance(event, ToolCallSignalled)]


def told(bench, count: int = 1) -> list[ToolCallSignalled]:
    bench.wait(lambda: len(signalled(bench)) >= count, f"{count} signals")
    return signalled(bench)


def sleeping(bench, code: str = "import time; time.sleep(60)"):
    """A tool call that is up: pid and id."""
    child, _ = bench.agent(f"run({code!r})")
    bench.wait(bench.started, "the call's start")
    return child, bench.started()[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_killed_a_call_is_told_with_its_name_and_before_the_end(bench, number):
    child, call = sleeping(bench)
    killer = f"import os; print(os.getpid(), flush=True); os.kill({call.pid}, {int(number)})"
    by = subprocess.run([PYTHON, "-S", "-c", killer], stdout=subprocess.PIPE, check=True, text=True)
    (event,) = told(bench)
    sender = (int(by.stdout), Path(PYTHON).name[:15])
    assert (event.id, event.pid, event.signal) == (call.id, call.pid, number)
    assert (event.sender_pid, event.sender_comm, event.by_kernel) == (*sender, False)
    assert event.words == f"{number.name} to pid {call.pid} from {sender[1]} (pid {sender[0]})"
    bench.finish(child)
    assert bench.ended(call.id).signal == number
    assert bench.events.index(event) < bench.events.index(bench.ended(call.id))


def test_a_fault_of_its_own_is_the_kernels_doing(bench):
    child, call = sleeping(bench, "import ctypes, time; time.sleep(0.2); ctypes.string_at(8)")
    (event,) = told(bench)
    assert (event.signal, event.by_kernel, event.sender_pid) == (signal.SIGSEGV, True, call.pid)
    bench.finish(child)


def test_an_escapee_is_followed_and_named_by_its_own_pid(bench):
    code = "import os, time; os.fork() or (os.setsid(), time.sleep(60)); time.sleep(60)"
    child, call = sleeping(bench, code)
    bench.wait(lambda: len(bench.tools.processes(call.id)) == 2, "the fork")
    (escapee,) = set(bench.tools.processes(call.id)) - {call.pid}
    os.kill(escapee, signal.SIGKILL)
    (event,) = told(bench)
    assert (event.id, event.pid, event.sender_pid) == (call.id, escapee, os.getpid())
    os.kill(call.pid, signal.SIGKILL)
    bench.finish(child)


def test_what_ends_nobody_and_what_is_sent_elsewhere_is_not_told(bench):
    child, call = sleeping(bench)
    stranger = subprocess.Popen([PYTHON, "-S", "-c", "import time; time.sleep(60)"])
    try:
        for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGWINCH, signal.SIGCHLD):
            os.kill(call.pid, number)
    finally:
        stranger.kill()
        stranger.wait()
    os.kill(call.pid, signal.SIGTERM)  # not SIGINT: Python takes it, and sends it to itself once more
    bench.finish(child)
    assert [event.signal for event in signalled(bench)] == [signal.SIGTERM]


def test_of_the_agent_itself_nothing_is_told(bench):
    child, call = sleeping(bench)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    os.kill(call.pid, signal.SIGKILL)
    bench.wait(lambda: bench.gone(call.id), "the call's end")
    assert {event.pid for event in told(bench)} == {call.pid}
