"""The engine as its users start it: a process of its own, awaited by its first line, ended by SIGTERM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class EngineProcess:
    url: str
    process: subprocess.Popen[str]


PROGRAM = ("-m", "equipoise.gpuctl.engine")
_INTERRUPTS_IGNORED = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


def start(
    *arguments: str,
    program: tuple[str, ...] = PROGRAM,
    environment: Mapping[str, str] | None = None,
    in_background: bool = False,
) -> subprocess.Popen[str]:
    """`program`: how Python is told what to run. `environment`: what to add.

    `in_background`: as by `&` in a shell script, with SIGINT ignored from the start.
    """
    return subprocess.Popen(
        [*(_INTERRUPTS_IGNORED if in_background else ()), sys.executable, *program, "--threads", "1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


@contextmanager
def running(*arguments: str, program: tuple[str, ...] = PROGRAM) -> Iterator[EngineProcess]:
    process = start("--listen", "127.0.0.1:0", *arguments, program=program)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("listening http://"), process.communicate()
        yield EngineProcess(first.split()[1], process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()


def failing(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a process that should not start."""
    process = start(*arguments)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors
