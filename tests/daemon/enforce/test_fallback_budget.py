"""Budgets without eBPF: a tool call is stopped at its hard budget from user space, and let go on by a grant."""

from __future__ import annotations

import subprocess
import time

import psutil
import pytest
from equipoise.daemon.enforce.actuator import Actuator
from equipoise.daemon.enforce.fallback_budget import TIER, FallbackBudget
from equipoise.daemon.enforce.freeze import FREEZE
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.enforce.stop import STOP
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.observe.journal.hold import HoldCause
from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.policies.actions import Decision, Grant, Kill, OutcomeStatus, ToolCallAction
from equipoise.policies.events import BudgetLevel, BudgetReached, Event, ProcessesGone, ToolCallMemoryStepped
from equipoise.policies.model import MIB, DecisionId, TenantId, ToolCallId

from ..conftest import Spawn, eventually

CALL = ToolCallId(5)
GROW = """
import sys, time
sys.stdin.readline()
held = []
for _ in range(int(sys.argv[1])):
    held.append(b"x" * (1 << 20))
    time.sleep(0.002)
print("done", flush=True)
sys.stdin.read()
"""


class Bench:
    """A tool call that grows to 200 MiB when told to, under a hard budget of 50 MiB."""

    def __init__(self, driver: CgroupDriver | None, journal: Journal, spawn: Spawn) -> None:
        self.driver = driver
        self.events: list[Event] = []
        self.child: subprocess.Popen[bytes] = spawn(GROW, "200")
        self.holds = Holds(journal, driver)
        self.budget = FallbackBudget(driver, self.holds, self.events.append)
        self.actuator = Actuator(self.holds, driver, self.budget, budget_tier=TIER)
        self.leaf: str | None = None
        if driver is not None:
            self.leaf = driver.create_tool_leaf(driver.create_sandbox(TenantId("t"), "s").path, CALL)
            assert driver.attach(self.child.pid, self.leaf).done
        assert self.budget.follow(CALL, leaf=self.leaf, pid=self.child.pid, soft_bytes=30 * MIB, hard_bytes=50 * MIB)
        self.actuator.bind(CALL, leaf=self.leaf, pid=self.child.pid)
        self.budget.poll()

    def go(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(b"go\n")
        self.child.stdin.flush()

    def polled(self, kind: type[Event]) -> bool:
        self.budget.poll()
        return any(isinstance(e, kind) for e in self.events)

    def levels(self) -> list[BudgetLevel]:
        return [e.level for e in self.events if isinstance(e, BudgetReached)]

    def polled_level(self, level: BudgetLevel) -> bool:
        self.budget.poll()
        return level in self.levels()

    def stands(self) -> bool:
        if self.driver is not None and self.leaf is not None:
            return self.driver.frozen(self.leaf) is True
        return psutil.Process(self.child.pid).status() == psutil.STATUS_STOPPED

    def do(self, action: ToolCallAction) -> tuple[OutcomeStatus, str]:
        now_ns = time.monotonic_ns()
        made = Decision(DecisionId("d"), now_ns, "r", 0, 0, "", action, TenantId("t"), "s", "e")
        outcome = self.actuator.execute(made)
        return outcome.status, outcome.tier


@pytest.fixture(params=[pytest.param("leaf", marks=pytest.mark.kernel), "processes"])
def bench(request: pytest.FixtureRequest, journal: Journal, spawn: Spawn) -> Bench:
    driver = request.getfixturevalue("driver") if request.param == "leaf" else None
    return Bench(driver, journal, spawn)


def test_at_the_hard_budget_it_stands_still_until_a_grant(bench: Bench) -> None:
    bench.go()
    assert eventually(lambda: bench.polled_level(BudgetLevel.HARD))
    assert bench.levels() in ([BudgetLevel.SOFT, BudgetLevel.HARD], [BudgetLevel.HARD])
    reached = next(e for e in bench.events if isinstance(e, BudgetReached) and e.level is BudgetLevel.HARD)
    assert reached.pid == bench.child.pid and 50 * MIB <= reached.used_bytes < 120 * MIB
    (hold,) = bench.holds.all()
    assert hold.cause == HoldCause.BUDGET
    assert hold.kind == (FREEZE if bench.leaf else STOP)
    assert eventually(bench.stands)
    used = processes.resident_bytes([bench.child.pid])
    time.sleep(0.2)
    assert processes.resident_bytes([bench.child.pid]) == used, "it grows no further"
    bench.budget.poll()
    assert bench.levels().count(BudgetLevel.HARD) == 1, "one stop is one event"
    assert bench.do(Grant(CALL, 250 * MIB, 400 * MIB)) == (OutcomeStatus.COMPLETED, TIER)
    assert not bench.holds.all()
    assert bench.child.stdout is not None and bench.child.stdout.readline() == b"done\n"
    bench.budget.poll()
    peaks = [e.peak_bytes for e in bench.events if isinstance(e, ToolCallMemoryStepped)]
    assert peaks == sorted(peaks) and peaks[-1] >= 200 * MIB


def test_a_call_that_stands_at_its_budget_can_be_killed_and_is_seen_to_be_gone(bench: Bench) -> None:
    bench.go()
    assert eventually(lambda: bench.polled_level(BudgetLevel.HARD))
    status, _ = bench.do(Kill(CALL, "too large"))
    assert status is OutcomeStatus.COMPLETED
    assert bench.child.wait(5) == -9 and not bench.holds.all()
    assert eventually(lambda: bench.polled(ProcessesGone))
    assert bench.do(Grant(CALL, 1, 2))[0] is OutcomeStatus.GONE


def test_a_call_below_its_budget_is_left_alone(bench: Bench) -> None:
    for _ in range(5):
        bench.budget.poll()
    assert bench.levels() == [] and not bench.holds.all()


def test_a_process_that_is_gone_already_is_not_followed(journal: Journal, spawn: Spawn) -> None:
    child = spawn("pass")
    child.wait(5)
    budget = FallbackBudget(None, Holds(journal, None), lambda event: None)
    assert not budget.follow(CALL, pid=child.pid)
    with pytest.raises(LookupError, match="never followed"):
        budget.set_budget(CALL, soft_bytes=0, hard_bytes=1)
