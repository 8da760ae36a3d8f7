"""What processes an agent starts, seen from outside and without our daemon: every fork, exec and exit, by strace.

Owns the recording and its reading. strace stops a process at the traced calls alone (--seccomp-bpf), so an agent of
many threads stays usable. What it cannot say: which of two threads that act at once was first.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_CALLS = "execve,execveat,fork,vfork,clone,clone3,setsid,setpgid,connect"
_LINE = re.compile(r"^(\d+) +(\d+\.\d+) (.*)$")
_UNFINISHED = re.compile(r"^(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?)(.*)$", re.DOTALL)
_ENDED = re.compile(r"^\+\+\+ (exited with (\d+)|killed by (\w+).*) \+\+\+$")
_SUPERSEDED = re.compile(r"^\+\+\+ superseded by execve in pid (\d+) \+\+\+$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "v": "\v", "f": "\f", "a": "\a", "b": "\b"}


@dataclass(slots=True)
class Exec:
    """One successful exec."""

    at_ns: int
    pid: int
    ppid: int
    pgid: int
    sid: int
    path: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(slots=True)
class Process:
    """One process from its fork to its end. Times: CLOCK_MONOTONIC, ns."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    born_ns: int
    how: str = "fork"
    ended_ns: int | None = None
    end: str = ""
    """"exit N" or a signal's name."""
    execs: list[Exec] = field(default_factory=list)
    ports: list[tuple[int, int]] = field(default_factory=list)
    """(at_ns, port) of each connect() to an address with a port."""


def command(output: Path) -> list[str]:
    """What to put in front of a command line to record it; AssertionError where strace is missing."""
    strace = shutil.which("strace")
    assert strace, "strace is missing: install Debian's package strace"
    return [strace, "-f", "--seccomp-bpf", "-q", "--signal=none", "-ttt", "-v", "-s", "100000",
            "-e", f"trace={_CALLS}", "-o", str(output), "--"]  # fmt: skip


def read(output: Path) -> list[Process]:
    """Every process of a recording, by the time of its birth."""
    # strace stamps wall time; the model and our daemon speak of CLOCK_MONOTONIC.
    offset_ns = time.monotonic_ns() - time.time_ns()
    return _Reader(offset_ns).read(output.read_text(errors="replace"))


@dataclass(slots=True)
class _Call:
    tid: int
    at_ns: int
    name: str
    arguments: str
    result: int | None


class _Reader:
    def __init__(self, offset_ns: int) -> None:
        self._offset_ns = offset_ns
        self._leader: dict[int, int] = {}
        """Process of each thread."""
        self._live: dict[int, Process] = {}
        self._all: list[Process] = []

    def read(self, text: str) -> list[Process]:
        for at_ns, tid, what in self._lines(text):
            if isinstance(what, _Call):
                self._apply(what)
            elif match := _ENDED.match(what):
                self._end(tid, at_ns, f"exit {match[2]}" if match[2] else match[3])
            elif match := _SUPERSEDED.match(what):
                self._leader.pop(int(match[1]), None)
        return sorted(self._all, key=lambda process: process.born_ns)

    def _lines(self, text: str) -> Iterator[tuple[int, int, _Call | str]]:
        """Calls at the time when they began, an exec when it was done; what was printed in two pieces is joined."""
        begun: dict[int, tuple[int, str]] = {}
        found: list[tuple[int, int, int, _Call | str]] = []
        for order, line in enumerate(text.splitlines()):
            if not (match := _LINE.match(line)):
                continue
            tid, rest = int(match[1]), match[3]
            at_ns = now_ns = int(float(match[2]) * 1e9) + self._offset_ns
            if unfinished := _UNFINISHED.match(rest):
                begun[tid] = (now_ns, unfinished[1])
                continue
            if resumed := _RESUMED.match(rest):
                if tid not in begun:
                    continue
                at_ns, head = begun.pop(tid)
                rest = head + resumed[2]
            call = _CALL.match(rest)
            if not call:
                found.append((now_ns, order, tid, rest))
                continue
            result = None if call[3] == "?" else int(call[3])
            if call[1].startswith("execve"):
                at_ns = now_ns
            found.append((at_ns, order, tid, _Call(tid, at_ns, call[1], call[2], result)))
        found.sort(key=lambda item: item[:2])
        for at_ns, _, tid, what in found:
            yield at_ns, tid, what

    def _process(self, tid: int, at_ns: int) -> Process:
        pid = self._leader.setdefault(tid, tid)
        if pid not in self._live:
            self._add(Process(pid, 0, pid, pid, at_ns, "start"))
        return self._live[pid]

    def _add(self, process: Process) -> None:
        self._live[process.pid] = process
        self._leader[process.pid] = process.pid
        self._all.append(process)

    def _apply(self, call: _Call) -> None:
        process = self._process(call.tid, call.at_ns)
        if call.name == "connect":
            if port := _PORT.search(call.arguments):
                process.ports.append((call.at_ns, int(port[1])))
            return
        if call.result is None or call.result < 0:
            return
        match call.name:
            case "fork" | "vfork" | "clone" | "clone3":
                if "CLONE_THREAD" in call.arguments:
                    self._leader[call.result] = process.pid
                    return
                parent = process.ppid if "CLONE_PARENT" in call.arguments.split("|") else process.pid
                how = "vfork" if call.name == "vfork" or "CLONE_VFORK" in call.arguments else "fork"
                self._add(Process(call.result, parent, process.pgid, process.sid, call.at_ns, how))
            case "execve" | "execveat":
                path, argv, environment = _exec_arguments(call.arguments)
                process.execs.append(
                    Exec(call.at_ns, process.pid, process.ppid, process.pgid, process.sid, path, argv, environment)
                )
            case "setsid":
                process.pgid = process.sid = process.pid
            case "setpgid":
                pid, pgid = (int(number) for number in call.arguments.split(","))
                target = self._live.get(pid or process.pid)
                if target is not None:
                    target.pgid = pgid or target.pid

    def _end(self, tid: int, at_ns: int, end: str) -> None:
        if self._leader.get(tid) == tid and tid in self._live:
            process = self._live.pop(tid)
            process.ended_ns, process.end = at_ns, end
        self._leader.pop(tid, None)


def _exec_arguments(text: str) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """Path, argv and environment from what strace prints: "path", ["a", "b"], ["KEY=value"]."""
    lists: list[list[str]] = []
    path, depth, position = "", 0, 0
    while position < len(text):
        if text[position] == '"':
            match = _STRING.match(text, position)
            if match is None:
                break
            if depth:
                lists[-1].append(_plain(match[1]))
            else:
                path = path or _plain(match[1])
            position = match.end()
            continue
        if text[position] == "[":
            depth += 1
            lists.append([])
        elif text[position] == "]":
            depth -= 1
        position += 1
    argv, environment = [*lists, [], []][:2]
    return path, tuple(argv), dict(entry.partition("=")[::2] for entry in environment)


def _plain(text: str) -> str:
    def letter(match: re.Match[str]) -> str:
        what = match[1]
        if what[0] == "x":
            return chr(int(what[1:], 16))
        if what[0] in "01234567":
            return chr(int(what, 8))
        return _LETTERS.get(what, what)

    plain = _ESCAPE.sub(letter, text)
    return plain.encode("latin-1", errors="replace").decode(errors="replace")
