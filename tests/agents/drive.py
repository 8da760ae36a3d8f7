"""Runs an agent's command line to its end, and is the terminal of those that want one.

Owns the process, its terminal, and what it leaves behind. An agent that asks nobody gets no terminal at all. One with a
screen never ends by itself: its terminal is closed, as a user closes a window, some time after `until()`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
from equipoise.tests.agents.clients import Launch

RUN_S = 300.0
QUIET_S = 0.3
"""A prompt is answered once its agent has been silent for that long: more of it may be on its way."""


LINGER_S = 2.0
"""How long a screen stays after its work is done."""
HANG_UP_S = 5.0
_QUERIES = (
    (b"\x1b[6n", b"\x1b[1;1R"),  # where is the cursor
    (b"\x1b[c", b"\x1b[?62;22c"),  # what are you
    (b"\x1b]10;?", b"\x1b]10;rgb:ffff/ffff/ffff\x1b\\"),  # which colours
    (b"\x1b]11;?", b"\x1b]11;rgb:0000/0000/0000\x1b\\"),
)
"""What screens ask a terminal before they begin, and what an xterm says."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of it."""

    pid: int
    returncode: int | None
    """None: it was still there after the limit and was killed. A screen that lived until its work was done has 0."""
    output: str
    took_s: float
    left_over: tuple[str, ...]
    """Commands of the processes that outlived it, those of its tool calls included. They are ended."""


def drive(
    launch: Launch,
    before: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    until: Callable[[], bool] = lambda: False,
    limit_s: float = RUN_S,
) -> Ended:
    """Run it in its workspace, behind the words `before`, with `extra` in its environment. What is late is ended.

    `until()` says whether the work of an agent with a screen is done; others end by themselves.
    """
    environment = {**launch.environment, **(extra or {})}
    began = time.monotonic()
    process, terminal = _start([*before, *launch.argv], environment, launch)
    returncode: int | None = None
    try:
        output, in_time = _follow(process, terminal, launch, until, began + limit_s)
        if in_time:
            returncode = process.returncode or 0
    finally:
        os.close(terminal)
        _end(process)
    took_s = time.monotonic() - began
    return Ended(process.pid, returncode, output, took_s, end_what_is_left(launch.environment["HOME"]))


def _start(argv: list[str], environment: Mapping[str, str], launch: Launch) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where its output is read (and what is typed is written)."""
    on_terminal = bool(launch.typing) or launch.screen
    if on_terminal:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        argv = ["setsid", "--ctty", *argv]  # replaces itself by the command: the pid stays
    else:
        ours, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            argv,
            env=dict(environment),
            cwd=launch.workspace,
            stdin=theirs if on_terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=not on_terminal,
        )
    finally:
        os.close(theirs)
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for what heard its terminal close; kill it where it did not listen."""
    try:
        process.wait(HANG_UP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_what_is_left(home: str) -> tuple[str, ...]:
    """Known by the home that was made for this run alone; whatever session or parent they have by now."""
    ended = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == home:
                ended.append(" ".join(process.cmdline()))
                process.kill()
    return tuple(ended)


def _follow(
    process: subprocess.Popen[bytes], terminal: int, launch: Launch, until: Callable[[], bool], deadline: float
) -> tuple[str, bool]:
    """Read until the process has ended or its work is done, and answer what is asked. False: it took too long."""
    output = bytearray()
    answered = 0
    """What lies before this was read before the last answer."""
    done_s: float | None = None
    while (now_s := time.monotonic()) < deadline:
        if launch.screen and done_s is None and until():
            done_s = now_s
        ended = process.poll() is not None
        if done_s is not None and now_s > done_s + LINGER_S:
            return output.decode(errors="replace"), True
        if piece := _read(terminal, 0 if ended else QUIET_S):
            output += piece
            for query, told in _QUERIES if launch.screen else ():
                if query in piece:
                    os.write(terminal, told)
            continue
        if ended:
            return output.decode(errors="replace"), True
        fresh = output[answered:].decode(errors="replace")
        for pattern, reply in launch.typing:
            if re.search(pattern, fresh):
                answered = len(output)
                os.write(terminal, reply.encode())
                break
    return output.decode(errors="replace"), False


def _read(terminal: int, patience_s: float) -> bytes:
    """What was printed; b"" where nothing is within `patience_s`."""
    readable, _, _ = select.select([terminal], [], [], patience_s)
    if not readable:
        return b""
    try:
        piece = os.read(terminal, 65536)
    except OSError:  # the other side of a terminal is gone
        piece = b""
    if not piece:
        time.sleep(0.02)
    return piece
