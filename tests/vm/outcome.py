"""How a guest's command ended, read from what the guest left behind."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    results: Mapping[str, str] = field(default_factory=dict)
    """Text of each file that the command left in /vmshare/results."""


def read_outcome(
    path: Path, seconds: float, failure: str | None, results: Mapping[str, str], console_tail: Callable[[], str]
) -> Outcome:
    """Interprets systemd's `SERVICE_RESULT EXIT_CODE EXIT_STATUS`, systemd.exec(5)."""
    if failure is not None:
        return Outcome(EXIT_NO_ANSWER, seconds, failure, results)
    if not path.exists():
        reason = f"CRASHED: the guest ended without saying how its command ended; its console ends:\n{console_tail()}"
        return Outcome(EXIT_NO_ANSWER, seconds, reason, results)
    result, how, status = path.read_text().split()
    if result == "timeout":
        return Outcome(
            EXIT_NO_ANSWER,
            seconds,
            f"HUNG: the command's time limit ended it inside the guest after {seconds:.0f} s",
            results,
        )
    if how == "exited":
        return Outcome(int(status), seconds, None, results)
    number = int(status) if status.isdigit() else signal.Signals[f"SIG{status}"].value
    return Outcome(128 + number, seconds, None, results)
