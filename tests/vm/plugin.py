"""pytest's two sides of the guest suite: the guest writes reports, the host shows them as its own.

On the host no test of tests/vm/guest is set up or run. Its reports come from the guest under the same node id, so that
selection (-k, -m, a path), failures, skips and durations look as if it had run here.
"""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .children import signals_as_exceptions
from .suite import REPORTS, GuestSuite

TESTS = Path(__file__).parent / "guest"
NOT_RUN = "VM TESTS NOT RUN"


def in_guest() -> bool:
    """Whether this pytest runs inside the VM."""
    return os.environ.get("EQUIPOISE_IN_VM") == "1"


class GuestReporter:
    """In the guest: each report crosses the share at once, so that a hang loses only the test that hangs."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _append({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _append({"report": self._config.hook.pytest_report_to_serializable(config=self._config, report=report)})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        _append({"finished": nodeid})


class HostReplay:
    """On the host: boots at the first test of the folder, with all that were selected, and shows what comes back."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._suite: GuestSuite | None = None
        self._signals = ExitStack()
        """While there is a guest: SIGTERM and SIGHUP end the run as Ctrl-C does, and the guest with it."""
        self._not_run: str | None = None
        self._outstanding: set[str] = set()
        """Selected tests whose result has not come back."""
        if os.environ.get("EQUIPOISE_VM") == "0":
            self._not_run = "switched off by EQUIPOISE_VM=0"

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Takes the place of pytest's own for the guest's tests, and for them only."""
        if not item.path.is_relative_to(TESTS):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """Waits for the guest's own end; after Ctrl-C or -x, with results outstanding, ends it."""
        if self._suite is None:
            return
        if self._outstanding:
            self._suite.close()
        else:
            self._suite.wait()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """What every reader of the log should see: that the VM did not run, or how long it took."""
        if self._not_run is not None:
            terminalreporter.write_line(f"{NOT_RUN}: {self._not_run}", red=True, bold=True)
        elif self._suite is not None:
            terminalreporter.write_line(f"VM tests: one boot, {self._suite.seconds:.0f} s with everything")

    def pytest_unconfigure(self) -> None:
        if self._suite is not None:
            self._suite.close()
        self._signals.close()

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        if self._not_run is None:
            if self._suite is None:
                selected = [each.nodeid for each in item.session.items if each.path.is_relative_to(TESTS)]
                self._signals.enter_context(signals_as_exceptions())
                self._suite = GuestSuite(selected)
                self._outstanding.update(selected)
            result = self._suite.result(item.nodeid)
            self._outstanding.discard(item.nodeid)
            if self._suite.not_run is None:
                hook = self._config.hook.pytest_report_from_serializable
                reports = [hook(config=self._config, data=data) for data in result.reports]
                if result.missing is not None:
                    reports.append(_report(item, "failed", result.missing))
                return reports
            self._not_run = self._suite.not_run
        if os.environ.get("EQUIPOISE_REQUIRE_VM") == "1":
            return [_report(item, "failed", f"{NOT_RUN}: {self._not_run}")]
        return [_report(item, "skipped", f"{NOT_RUN}: {self._not_run}")]


def _report(item: pytest.Item, outcome: Any, reason: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, (line or 0) + 1, reason) if outcome == "skipped" else reason
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, longrepr, "call")


def _append(entry: dict[str, Any]) -> None:
    # Opened each time: the line is across the share when this returns, even if the guest dies next.
    with REPORTS.open("a") as file:
        file.write(json.dumps(entry) + "\n")
