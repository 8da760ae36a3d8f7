"""Runs an agent's tool call as a real process, and learns from the daemon what was done to it.

Owns the three ways a call may be known to the daemon: announced by the agent (hook), run under `equipoise tool`
(wrapper), or seen by the kernel alone (lineage). Must not: decide what a killed call means for the plan.

The output goes to a file, not a pipe: a background process that outlives its call, or one that is held stopped, would
keep a pipe open and hang whoever reads it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ....policies.model import ToolCallSource
from . import hearsay
from .hearsay import Identity
from .plan import Step
from .sample import git_environment

_SHELL_SIGNAL_BASE = 128
_NOT_FOUND = 127


@dataclass(frozen=True, slots=True)
class ToolResult:
    """How a tool call ended. Exactly one of exit_code and signal is set."""

    exit_code: int | None
    signal: int | None
    start_ns: int
    end_ns: int
    output: str
    """Standard output and error together, at most 64 KiB."""
    notice: str
    """What the daemon says was done to it; empty: nothing, or no daemon."""

    def accepted_by(self, step: Step) -> bool:
        """A call ended by a signal was ended by somebody else: the agent is told, it has not failed."""
        return self.signal is not None or step.accepts is None or self.exit_code in step.accepts

    def outcome(self) -> str:
        if self.signal is not None:
            return f"killed by {signal.Signals(self.signal).name}"
        return f"exit code {self.exit_code}"


class ToolRunner:
    """Runs tool calls one after the other in `workdir`."""

    def __init__(self, identity: Identity, workdir: Path, timeout_s: float = 90.0) -> None:
        self._identity = identity
        self._workdir = workdir
        self._timeout_s = timeout_s
        self._count = 0
        bin_dir = str(Path(sys.executable).parent)
        self._environment = {
            **os.environ,
            **dict(git_environment()),
            "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, step: Step) -> ToolResult:
        """Run one step's command to its end. A call that outlives the time limit is killed, with its process group."""
        self._count += 1
        announced = self._announce(step) if step.found_by is ToolCallSource.HOOK else None
        argv = list(step.command)
        if step.found_by is ToolCallSource.WRAPPER:
            argv = [sys.executable, "-m", "equipoise.daemon.cli", "tool", "--", *argv]
        start_ns = time.monotonic_ns()
        with tempfile.TemporaryFile(dir=self._workdir.parent) as out:
            try:
                process = subprocess.Popen(
                    argv,
                    cwd=self._workdir,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._finish(announced, None, _NOT_FOUND)
                message = f"{argv[0]}: {error.strerror}"
                return ToolResult(_NOT_FOUND, None, start_ns, time.monotonic_ns(), message, "")
            try:
                code = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                _kill_group(process.pid)
                code = process.wait()
            except BaseException:
                # The agent itself is being ended; its tool call must not outlive it.
                _kill_group(process.pid)
                raise
            end_ns = time.monotonic_ns()
            out.seek(0)
            output = out.read(65536).decode(errors="replace")
        exit_code, by_signal = _split(code)
        notice = self._finish(announced, process.pid, exit_code)
        return ToolResult(exit_code, by_signal, start_ns, end_ns, output, notice)

    def _announce(self, step: Step) -> str | None:
        """Tell the daemon that a call begins; its id, or None where nobody listens (the call runs all the same)."""
        if self._identity.socket is None:
            return None

        command = " ".join(step.command)
        return hearsay.begin(self._identity.socket, self._identity, command, f"{os.getpid()}-{self._count}")

    def _finish(self, announced: str | None, pid: int | None, exit_code: int | None) -> str:
        """Tell the daemon that an announced call ended, or ask about one that nobody announced: its notice."""
        if self._identity.socket is None:
            return ""

        if announced is not None:
            return hearsay.end(self._identity.socket, announced, exit_code)
        # Only a call that was ended is worth a question; the rest of an agent's calls go by unasked, as they would
        # with an agent that has never heard of this daemon.
        return "" if exit_code is not None or pid is None else hearsay.why(self._identity.socket, self._identity, pid)


def _split(code: int) -> tuple[int | None, int | None]:
    """(exit code, signal) of a return code, 128+n from a shell or a wrapper included."""
    if code < 0:
        return None, -code
    known = {s.value for s in signal.Signals}
    if code > _SHELL_SIGNAL_BASE and code - _SHELL_SIGNAL_BASE in known:
        return None, code - _SHELL_SIGNAL_BASE
    return code, None


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
