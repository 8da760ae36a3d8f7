"""Undoing everything that is held back when the daemon is gone, whatever ended it.

Owns `release`, which the guardian process, the next start of the daemon and `equipoise release` share, and the
guardian itself: a small process that the daemon starts, in a session of its own, deaf to the signals that end the
daemon. It holds one end of a pipe and a pidfd; when either says that the daemon is gone it releases and exits.
Must not import what a small process does not need (no gRPC, no metrics, no policy), and must not act while the daemon
lives, or when a next daemon has taken the journal over.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import log
from ..errors import CgroupError, GuardianError, JournalError
from ..observe.journal import Hold, JournalReader, clear_holds, lock_holder
from ..sandboxes.cgroups import CgroupDriver, Effect, Limit
from ..sandboxes.processes import PROC, boot_id, identify
from . import rungs
from .stop import continue_stopped

_READY = b"ready\n"
_START_TIMEOUT_S = 30.0
"""It takes 0.2 s; a daemon that comes back on a starved machine is worth waiting for (the unit waits 60 s)."""
_PATIENCE_S = 0.25
"""With a locked journal: whatever is stopped waits as long."""
_IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
)
_OOM_SCORE = "-900"


@dataclass(frozen=True, slots=True)
class Release:
    """What a release came to."""

    undone_count: int = 0
    """Holds of the journal that were undone."""
    gone_count: int = 0
    """Holds whose cgroup or process no longer existed."""
    found_count: int = 0
    """Frozen cgroups, limits and stopped processes below our base that no journal entry had undone."""
    failed: tuple[str, ...] = ()
    journal_problem: str | None = None
    """Why the journal could not be used; the base cgroup was walked all the same."""

    @property
    def complete(self) -> bool:
        return not self.failed


def release(journal: Path | None, driver: CgroupDriver | None, proc_root: Path = PROC) -> Release:
    """Undo every hold in the journal, then lift whatever is still held back below our base cgroup.

    Idempotent; safe with a missing, locked or damaged journal (then the walk does what it can), and safe beside a live
    daemon, whose holds it undoes as well. Limits below the base are all ours, so the walk lifts every one of them.
    """
    holds, problem = _holds_of(journal, proc_root)
    undone, gone, failed = [], 0, []
    for hold in holds:
        result = rungs.undo(hold, driver, proc_root)
        if result.effect is Effect.FAILED:
            failed.append(result.detail)
            continue
        undone.append(hold)
        gone += result.effect is Effect.GONE
    if journal is not None and undone:
        try:
            clear_holds(journal, undone)
        except JournalError as error:
            problem = str(error)  # left in the journal: undoing them once more does nothing
    found = 0
    if driver is not None:
        restored = {(h.path, limit) for h in undone if (limit := rungs.limit_of(h)) is not None}
        found, refused = _walk(driver, proc_root, restored)
        failed.extend(refused)
    return Release(len(undone) - gone, gone, found, tuple(failed), problem)


def _holds_of(journal: Path | None, proc_root: Path) -> tuple[tuple[Hold, ...], str | None]:
    if journal is None:
        return (), None
    try:
        with JournalReader(journal, patience_s=_PATIENCE_S) as reader:
            return reader.holds(boot_id(proc_root)), None
    except JournalError as error:
        return (), str(error)


def _walk(driver: CgroupDriver, proc_root: Path, restored: set[tuple[str | None, Limit]]) -> tuple[int, list[str]]:
    """Lift everything below the base, leaves first; answers how much was found, and what refused.

    Limits that the journal has just `restored` stay as it said they were.
    """
    found, failed = 0, []
    try:
        paths = driver.below(driver.base)
        for path in reversed(paths):
            if path == driver.base:
                continue  # the base itself may be the service's own cgroup, whose limits are systemd's
            keep = frozenset(limit for at, limit in restored if at == path)
            found += driver.restricted(path, keep)
            failed += [r.detail for r in driver.lift(path, keep) if r.effect is Effect.FAILED]
        # After the thaw: a frozen process takes its SIGCONT only then.
        result = continue_stopped(driver.processes(driver.base), proc_root)
    except CgroupError as error:
        return found, [*failed, str(error)]
    if result.effect is Effect.FAILED:
        failed.append(result.detail)
    return found + result.count, failed


class Guardian:
    """The daemon's handle on its guardian process."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int) -> None:
        self._process = process
        self._pipe = pipe

    @classmethod
    def start(
        cls, journal: Path, *, cgroup_root: Path = Path("/sys/fs/cgroup"), proc_root: Path = PROC, base: str | None
    ) -> Guardian:
        """Start it and wait until it watches (about 0.2 s). `base`: None where there are no cgroups.

        Raises GuardianError; then the daemon may observe, and must hold nothing back.
        """
        theirs, ours = os.pipe()
        command = [
            sys.executable,
            "-m",
            "equipoise.daemon.enforce.guardian",
            "--journal",
            str(journal),
            "--pipe",
            str(theirs),
        ]
        command += ["--daemon", str(os.getpid()), "--cgroup-root", str(cgroup_root), "--proc-root", str(proc_root)]
        if base is not None:
            command += ["--base", base]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(theirs,),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        except OSError as error:
            os.close(ours)
            raise GuardianError(f"{sys.executable}: the guardian cannot be started: {error.strerror}") from error
        finally:
            os.close(theirs)
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
        answer = process.stdout.readline() if readable else b""
        process.stdout.close()
        if answer != _READY:
            os.close(ours)
            process.kill()
            process.wait()
            raise GuardianError("the guardian did not come up: try python -m equipoise.daemon.enforce.guardian --help")
        return cls(process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """Where not, start another before anything more is held back."""
        return self._process.poll() is None

    def close(self, timeout_s: float = 5.0) -> None:
        """Let it release what is left and exit; it does the same when the daemon dies."""
        os.close(self._pipe)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _watch(pipe: int, daemon_pid: int) -> None:
    """Block until the daemon is gone: the pipe's other end is closed, or its pidfd is ready.

    Either alone can be late: a child that the daemon forked may keep the pipe open.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(daemon_pid), select.POLLIN)
    except OSError:
        pass  # gone already, which the pipe says too; or a kernel before 5.3, where the pipe must do
    print(_READY.decode(), end="", flush=True)
    while True:
        try:
            if poll.poll():
                return
        except InterruptedError:
            continue


def main(arguments: Sequence[str] | None = None) -> int:
    """The guardian process. Exit code 0: everything was released, or a next daemon has taken over."""
    parser = argparse.ArgumentParser(
        prog="python -m equipoise.daemon.enforce.guardian",
        description="Releases what a daemon held back, when it is gone.",
    )
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--pipe", type=int, required=True, help="inherited descriptor; the daemon holds the other end")
    parser.add_argument("--daemon", type=int, required=True, help="pid of the daemon")
    parser.add_argument("--cgroup-root", type=Path, default=Path("/sys/fs/cgroup"))
    parser.add_argument("--proc-root", type=Path, default=PROC)
    parser.add_argument("--base", help="base cgroup; without it nothing is walked")
    options = parser.parse_args(arguments)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    log.configure()
    try:
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, "ascii")
    except OSError:
        pass  # not root: the guardian is small, and the kernel takes the large ones first
    driver = None
    if options.base is not None:
        try:
            driver = CgroupDriver.open(options.cgroup_root, options.proc_root, options.base)
        except CgroupError as error:
            log.warning("guardian_without_cgroups", error=error)
    daemon = identify(options.daemon, options.proc_root)
    _watch(options.pipe, options.daemon)
    holder = lock_holder(options.journal)
    if holder is not None and holder != options.daemon and identify(holder, options.proc_root) != daemon:
        log.event("guardian_superseded", daemon_pid=options.daemon, next_pid=holder)
        return 0
    started_ns = time.monotonic_ns()
    result = release(options.journal, driver, options.proc_root)
    nothing = result == Release()
    log.event(
        "guardian_released",
        logging.DEBUG if nothing else logging.INFO,
        daemon_pid=options.daemon,
        undone=result.undone_count,
        gone=result.gone_count,
        found=result.found_count,
        failed="; ".join(result.failed) or None,
        journal=result.journal_problem,
        duration_ms=(time.monotonic_ns() - started_ns) / 1e6,
    )
    return 0 if result.complete else 1


if __name__ == "__main__":
    sys.exit(main())
