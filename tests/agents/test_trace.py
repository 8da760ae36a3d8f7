"""Reading of strace's output: first as literals, then a real recording of a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from equipoise.tests.agents import trace

HEAD = "100 1.000000 "


def read(tmp_path, *lines: str) -> list[trace.Process]:
    output = tmp_path / "strace"
    output.write_text("\n".join(lines) + "\n")
    return trace.read(output)


def test_a_child_is_born_when_its_fork_began_and_runs_before_it_returned(tmp_path):
    first, child = read(
        tmp_path,
        '100 1.000000 execve("/bin/sh", ["sh", "-c", "a \\"b\\"\\nc"], ["HOME=/x", "A=b=c"]) = 0',
        "100 2.000000 vfork( <unfinished ...>",
        "101 2.100000 setsid() = 101",
        '101 2.200000 execve("/bin/ls", ["ls"], ["HOME=/x"]) = 0',
        "100 2.300000 <... vfork resumed>) = 101",
        "101 2.400000 +++ exited with 3 +++",
        "100 2.500000 +++ killed by SIGKILL +++",
    )
    [shell], [ls] = first.execs, child.execs
    assert shell.argv == ("sh", "-c", 'a "b"\nc') and shell.environment == {"HOME": "/x", "A": "b=c"}
    assert (child.ppid, child.how, child.end, first.end) == (100, "vfork", "exit 3", "SIGKILL")
    assert (ls.pid, ls.ppid, ls.pgid, ls.sid) == (101, 100, 101, 101)
    assert child.born_ns < ls.at_ns < (child.ended_ns or 0) and ls.at_ns - child.born_ns == pytest.approx(2e8, rel=0.01)


def test_threads_are_no_processes_and_fork_for_their_process(tmp_path):
    first, child = read(
        tmp_path,
        '100 1.0 execve("/usr/bin/node", ["node"], []) = 0',
        "100 1.1 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 101",
        "101 1.2 clone(child_stack=NULL, flags=CLONE_VM|CLONE_VFORK|SIGCHLD) = 102",
        "101 1.3 connect(5, {sa_family=AF_INET, sin_port=htons(8800), sin_addr=...}, 16) = -1 EINPROGRESS (x)",
        "101 1.4 +++ exited with 0 +++",
    )
    assert (first.pid, child.pid, child.ppid, child.how) == (100, 102, 100, "vfork")
    assert first.ended_ns is None and [port for _, port in first.ports] == [8800]


def test_an_exec_that_failed_and_one_of_a_group_are_told_apart(tmp_path):
    [first] = read(
        tmp_path,
        '100 1.0 execve("/bin/nope", ["nope"], []) = -1 ENOENT (No such file or directory)',
        "100 1.1 setpgid(0, 0) = 0",
        '100 1.2 execve("/bin/ls", ["ls", "\\303\\244"], []) = 0',
    )
    assert [one.argv for one in first.execs] == [("ls", "ä")] and first.execs[0].pgid == 100


@pytest.mark.agents
def test_a_real_shell_is_recorded_with_its_children(tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is missing: install Debian's package strace")
    output = tmp_path / "strace"
    before_ns = time.monotonic_ns()
    code = "sleep 0.1 & setsid sh -c 'exit 4'; wait; true"
    done = subprocess.run([*trace.command(output), "sh", "-c", code], env={**os.environ, "MARK": "x"}, check=False)
    if done.returncode:
        pytest.skip("strace may not trace here")
    processes = trace.read(output)
    by_command = {one.argv[:2]: (process, one) for process in processes for one in process.execs}
    shell, sleeping, inner = by_command["sh", "-c"], by_command["sleep", "0.1"], by_command["setsid", "sh"]
    assert sleeping[1].ppid == processes[0].pid and shell[1].environment["MARK"] == "x"
    assert (sleeping[0].ended_ns or 0) - sleeping[0].born_ns >= 100_000_000
    assert inner[0].end == "exit 4" and inner[0].sid == inner[0].pid
    assert all(before_ns < process.born_ns < time.monotonic_ns() for process in processes)
