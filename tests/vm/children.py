"""Child processes that do not outlive the harness.

Owns how a child is started, detached from the terminal and ended. Must not know what the child is.
"""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def child_process(
    command: Sequence[str | Path], environment: Mapping[str, str], capture: bool, sink: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with this block, and, by its parent-death signal, with this process.

    A captured child leaves the terminal's process group: Ctrl-C reaches the harness alone, which then ends it.
    """
    stdout: IO[bytes] | int | None = (sink or subprocess.PIPE) if capture else None
    child = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        env=dict(environment),
        stdin=subprocess.DEVNULL if capture else None,
        stdout=stdout,
        stderr=subprocess.STDOUT if capture else None,
        start_new_session=capture,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout is not None:
            child.stdout.close()


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that nothing is left running. Only the main thread may ask for that."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    try:
        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
