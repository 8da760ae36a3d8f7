"""How a guest's command ended, read from what the guest left behind."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXIT_NO_ANSWER = 124  # timeout(1)'s exit status


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the command ended."""

    exit_code: int
    seconds: float
    """Wall time from the start of QEMU to its end."""
    failure: str | None = None
    """Where no exit code came back: `HUNG: ...` or `CRASHED: ...`, one line; the exit code is then 124."""


def read_outcome(path: Path, seconds: float, failure: str | None, console_tail: Callable[[], str]) -> Outcome:
    """Interprets systemd's `SERVICE_RESULT EXIT_CODE EXIT_STATUS`, systemd.exec(5)."""
    if failure is not None:
        return Outcome(EXIT_NO_ANSWER, seconds, failure)
    if not path.exists():
        failure = f"CRASHED: the guest ended without saying how its command ended; its console ends:\n{console_tail()}"
        return Outcome(EXIT_NO_ANSWER, seconds, failure)
    result, how, status = path.read_text().split()
    if result == "timeout":
        failure = f"HUNG: the command's time limit ended it inside the guest after {seconds:.0f} s"
        return Outcome(EXIT_NO_ANSWER, seconds, failure)
    if how == "exited":
        return Outcome(int(status), seconds)
    number = int(status) if status.isdigit() else signal.Signals[f"SIG{status}"].value
    return Outcome(128 + number, seconds)
