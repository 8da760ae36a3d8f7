"""Which tiers of tests ran, and why the others did not: a summary at the end of every run.

Owns that report and nothing else; fixtures live in the folders that use them. A tier is a marker (kernel, engine, vm,
agents); a test without one is of the pure tier. A file that skips itself while it is collected counts for its folder's
tier.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Any

import pytest

TIERS = ("pure", "kernel", "engine", "vm", "agents")


class TierSummary:
    """Counts what ran and, by reason, what did not."""

    def __init__(self) -> None:
        self._ran: Counter[str] = Counter()
        self._not_run: dict[str, Counter[str]] = defaultdict(Counter)
        self._deselected: dict[str, Counter[str]] = defaultdict(Counter)
        self._tiers: dict[str, set[str]] = {}
        """By node id, until a report takes them along: a worker's are counted where there are no items."""

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self._tiers[item.nodeid] = _tiers({mark.name for mark in item.iter_markers()})

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        for item in items:
            marks = {mark.name for mark in item.iter_markers()}
            why = "deselected on the command line" + (" (slow)" if "slow" in marks else "")
            for tier in _tiers(marks):
                self._deselected[tier][why] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker tells the process that prints: only reports go there by themselves. All have deselected the same."""
        if (told := getattr(session.config, "workeroutput", None)) is not None:
            told["deselected"] = {tier: dict(whys) for tier, whys in self._deselected.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        told = getattr(node, "workeroutput", {}).get("deselected", {})
        self._deselected.update({tier: Counter(whys) for tier, whys in told.items()})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            folders = set(PurePosixPath(report.nodeid.split("::")[0]).parts)
            for tier in _tiers(folders):
                self._not_run[tier][f"whole file: {_reason(report)}"] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tiers: list[str] = getattr(report, "tiers", None) or sorted(self._tiers.get(report.nodeid, {TIERS[0]}))
        report.tiers = tiers  # type: ignore[attr-defined]  # pytest carries what it does not know across processes
        if report.skipped and not hasattr(report, "wasxfail"):
            for tier in tiers:
                self._not_run[tier][_reason(report)] += 1
        elif report.when == "call":
            for tier in tiers:
                self._ran[tier] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("tiers")
        for tier in TIERS:
            skipped = self._not_run[tier] + self._deselected[tier]
            if not self._ran[tier] and not skipped:
                terminalreporter.write_line(f"{tier}: none collected")
                continue
            terminalreporter.write_line(f"{tier}: {self._ran[tier]} ran, {skipped.total()} not run")
            for reason, count in skipped.most_common():
                terminalreporter.write_line(f"  {count} x {reason}")


def _tiers(names: set[str]) -> set[str]:
    return names & set(TIERS[1:]) or {"pure"}


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ").strip() or "no reason given"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TierSummary(), "tier-summary")
