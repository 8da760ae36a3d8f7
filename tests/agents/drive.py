"""Runs an agent's command line to its end, and types for those that ask their user.

Owns the process and its terminal. An agent that asks nobody gets no terminal at all.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.tests.agents.clients import Launch

RUN_S = 300.0
QUIET_S = 0.3
"""A prompt is answered once its agent has been silent for that long: more of it may be on its way."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of it."""

    pid: int
    returncode: int | None
    """None: it was still there after RUN_S and was killed."""
    output: str
    took_s: float


def drive(
    launch: Launch, before: Sequence[str] = (), extra: Mapping[str, str] | None = None, limit_s: float = RUN_S
) -> Ended:
    """Run it in its workspace, behind the words `before`, with `extra` in its environment. What is late is ended."""
    argv, environment = [*before, *launch.argv], {**launch.environment, **(extra or {})}
    began = time.monotonic()
    process, terminal = _start(argv, environment, launch.workspace, bool(launch.typing))
    try:
        output, in_time = _follow(process, terminal, launch.typing, began + limit_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(terminal)
    return Ended(process.pid, process.returncode if in_time else None, output, time.monotonic() - began)


def _start(
    argv: list[str], environment: Mapping[str, str], folder: Path, types: bool
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where its output is read (and what is typed is written)."""
    if types:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    else:
        ours, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            argv,
            env=dict(environment),
            cwd=folder,
            stdin=theirs if types else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    return process, ours


def _follow(
    process: subprocess.Popen[bytes], terminal: int, typing: Sequence[tuple[str, str]], deadline: float
) -> tuple[str, bool]:
    """Read until the process has ended, and answer what `typing` knows. False: the deadline came first."""
    output = bytearray()
    answered = 0
    """What lies before this was read before the last answer."""
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        readable, _, _ = select.select([terminal], [], [], 0 if ended else QUIET_S)
        if readable:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other side of a terminal is gone
                piece = b""
            if piece:
                output += piece
                continue
            if not ended:
                time.sleep(0.02)
        if ended:
            return output.decode(errors="replace"), True
        fresh = output[answered:].decode(errors="replace")
        for pattern, reply in typing:
            if re.search(pattern, fresh):
                answered = len(output)
                os.write(terminal, reply.encode())
                break
    return output.decode(errors="replace"), False
