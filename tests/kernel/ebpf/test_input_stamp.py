"""The number that tells the command lines of a persistent shell apart, whatever they are fed through."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest
from equipoise.tests.kernel.ebpf.conftest import SANDBOX

pytestmark = pytest.mark.kernel
LINES = [
    "expr 1; expr 2; (expr 3; expr 4)",
    "expr 5",
    "for n in 6 7 8; do expr $n; done",
    "cd /",
    "expr 9 | cat | wc -c",
    "test -n x && sort /dev/null",
    "expr 10\nuname",
    "true; date",
]
PROGRAMS = [
    {"expr 1", "expr 2", "expr 3", "expr 4"},
    {"expr 5"},
    {"expr 6", "expr 7", "expr 8"},
    set(),
    {"expr 9", "cat", "wc -c"},
    {"sort /dev/null"},
    {"expr 10", "uname"},
    {"date"},
]


class Shell:
    """A shell that is followed as an agent; `line` comes back once what it was fed has said its last word."""

    def __init__(self, bench, argv: tuple[str, ...], how: str) -> None:
        self.bench = bench
        if how == "pipe":
            theirs, ours = os.pipe()
        elif how == "socket":
            pair = socket.socketpair()
            theirs, ours = pair[0].detach(), pair[1].detach()
        else:
            ours, theirs = pty.openpty()
        self.ours = ours
        self.process = subprocess.Popen(
            argv, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PS1": ""}
        )
        os.close(theirs)
        bench.tools.register_agent(self.process.pid, SANDBOX)

    def line(self, text: str) -> None:
        os.write(self.ours, f"{text}\necho said\n".encode())
        assert self.process.stdout is not None
        while b"said" not in self.process.stdout.readline():
            pass

    def close(self) -> None:
        os.close(self.ours)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def shell(bench) -> Iterator[Callable[..., Shell]]:
    started: list[Shell] = []

    def start(argv: tuple[str, ...], how: str) -> Shell:
        started.append(Shell(bench, argv, how))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.parametrize(
    ("program", "how"),
    [("bash", "pipe"), ("dash", "pipe"), ("bash", "socket"), ("dash", "socket"), ("bash", "terminal")],
)
def test_the_programs_of_one_line_have_one_stamp_and_those_of_the_next_another(bench, shell, program, how):
    if not shutil.which(program):
        pytest.skip(f"no {program} here")
    fed = shell(("bash", "--norc", "-s") if program == "bash" else ("dash", "-s"), how)
    bench.tick()
    for text in LINES:
        fed.line(text)
    bench.tick()
    stamp_of = {call.command: call.input_stamp for call in bench.started()}
    assert stamp_of.keys() == set().union(*PROGRAMS)
    lines = [{stamp_of[command] for command in programs} for programs in PROGRAMS if programs]
    # Only of a pipe is it known that two lines came as one request.
    of_two = 2 if how == "terminal" or (how, program) == ("socket", "bash") else 1
    assert [len(stamps) for stamps in lines] == [1, 1, 1, 1, 1, of_two, 1], lines
    assert len(set().union(*lines)) == 6 + of_two, "no two lines have the same"
    assert 0 not in stamp_of.values()


def test_a_program_whose_shell_is_no_longer_above_it_has_none(bench, shell):
    fed = shell(("bash", "--norc", "-s"), "pipe")
    fed.line("( (sleep 0.1; uname) >/dev/null & ); expr 1")
    bench.wait(lambda: any(call.command == "uname" for call in bench.started()), "the last program")
    stamp_of = {call.command: call.input_stamp for call in bench.started()}
    assert stamp_of["expr 1"] and not stamp_of["uname"]
