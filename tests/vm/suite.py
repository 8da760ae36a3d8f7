"""The guest's tests as the host's pytest needs them: one boot, and each test's result as it comes.

Owns the guest's pytest run and the file of reports that crosses the share. Decides nothing about how a result is shown
(guest/conftest.py does) and makes no difference between a test that failed and one that passed.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bytecode import compile_for_guest
from .errors import VmError
from .machine import REPOSITORY, SHARE_IN_GUEST, Machine, settings_from_environment
from .scheduler_build import compile_scheduler

REPORTS = SHARE_IN_GUEST / "results" / "reports.jsonl"
"""In the guest. One JSON object a line: {"started": id}, {"report": pytest's serialised form} or {"finished": id}."""
STACKS_AFTER_S = 90
"""A test that runs so long in the guest has the stacks of its threads printed (pytest's faulthandler_timeout)."""


OUTPUT_SHOWN = 6000
"""Characters of the guest's output that a failure carries along."""


@dataclass(frozen=True, slots=True)
class GuestResult:
    """What came back of one test."""

    reports: tuple[dict[str, Any], ...]
    """Serialised reports of setup, call and teardown, as far as they ran."""
    missing: str | None = None
    """Why the reports are incomplete, None where they are not."""


class ReportLog:
    """The file of reports, read while it grows."""

    def __init__(self, path: Path) -> None:
        self.running: str | None = None
        """The test that has started and not finished; the one that hangs, once the guest has ended."""
        self._path = path
        self._read_characters = 0
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._finished: set[str] = set()

    def read(self) -> None:
        """Takes in what is new. A line that is still being written waits for the next call."""
        text = self._path.read_text() if self._path.exists() else ""
        complete = text.rfind("\n") + 1
        for line in text[self._read_characters : complete].splitlines():
            match json.loads(line):
                case {"started": node_id}:
                    self.running = node_id
                    self._reports[node_id] = []
                case {"report": report}:
                    self._reports[report["nodeid"]].append(report)
                case {"finished": node_id}:
                    self.running = None
                    self._finished.add(node_id)
        self._read_characters = complete

    def finished(self, node_id: str) -> bool:
        return node_id in self._finished

    def reports(self, node_id: str) -> tuple[dict[str, Any], ...]:
        return tuple(self._reports.get(node_id, ()))

    def why_missing(self, node_id: str, failure: str | None, output: str) -> str:
        """In words, why a test has no complete result. `failure` and `output` are the guest's."""
        failure = failure or "the guest's pytest ended without a result of this test"
        if self.running is None:
            return f"not run: {failure}. The guest's output ends:\n{output}"
        if node_id != self.running:
            return f"not run: {failure}, in {self.running}"
        return f"{failure}\nThis test was running. The guest's output ends:\n{output}"


class GuestSuite:
    """Runs tests in one guest, in a thread of its own, so that results are shown while others still run."""

    def __init__(self, node_ids: Sequence[str]) -> None:
        self.not_run: str | None = None
        """Why there was no guest at all; None where there was one."""
        self.seconds = 0.0
        """Wall time of everything: packages, boot and tests."""
        self._failure: str | None = None
        self._node_ids = tuple(node_ids)
        self._output = bytearray()
        self._directory = tempfile.TemporaryDirectory(prefix="equipoise-vm-suite-")
        self._share = Path(self._directory.name)
        self._log = ReportLog(self._share / REPORTS.relative_to(SHARE_IN_GUEST))
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vm", daemon=True)
        self._thread.start()

    def result(self, node_id: str) -> GuestResult:
        """Waits for the test to finish, or for the guest to end without it."""
        while True:
            alive = self._thread.is_alive()
            self._log.read()
            if self._log.finished(node_id):
                return GuestResult(self._log.reports(node_id))
            if not alive:
                output = self._output.decode(errors="replace")[-OUTPUT_SHOWN:]
                missing = self.not_run or self._log.why_missing(node_id, self._failure, output)
                return GuestResult(self._log.reports(node_id), missing)
            time.sleep(0.1)

    def wait(self) -> None:
        """Returns when the guest has ended."""
        self._thread.join()

    def close(self) -> None:
        """Ends the guest if it still runs. Safe to call twice."""
        self._cancelled.set()
        self._thread.join()
        self._directory.cleanup()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            machine = Machine(settings_from_environment(), say=self._say)
            machine.prepare()
            compile_for_guest(REPOSITORY, self._node_ids)
            compile_scheduler(machine.settings.cache, machine.packages, machine.vmlinux)
            outcome = machine.run(
                _pytest_command(self._node_ids),
                environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                cwd=REPOSITORY,
                share=self._share,
                output=self._output.extend,
                cancelled=self._cancelled,
            )
            self._failure = outcome.failure
        except VmError as error:
            self.not_run = str(error)
        finally:
            self.seconds = time.monotonic() - started

    def _say(self, line: str) -> None:
        self._output.extend(line.encode() + b"\n")


def _pytest_command(node_ids: Sequence[str]) -> list[str]:
    """pytest as the guest runs it: no cache to write, and options of plugins that are not loaded pass in silence."""
    settings = ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={STACKS_AFTER_S}"]
    # The venv's python is a link to the interpreter's real binary, which a shim on PATH is not.
    return [sys.executable, "-m", "pytest", "-q", *settings, "-W", "ignore::pytest.PytestConfigWarning", *node_ids]
