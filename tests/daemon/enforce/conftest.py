"""Fixtures for enforce: a hold book that looks at the world, a fake v2 tree with tool calls, kernel budgets."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from equipoise.daemon.enforce import freeze, throttle
from equipoise.daemon.enforce.actuator import Actuator
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.errors import JournalError
from equipoise.daemon.observe.journal.hold import Hold, HoldKind
from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.daemon.sandboxes.processes import ProcessRef
from equipoise.policies.actions import Decision, Outcome, SwapIn, ToolCallAction
from equipoise.policies.model import NS_PER_S, DecisionId, TenantId, ToolCallId

from ..conftest import V2_FILES, FakeTree

CALL = ToolCallId(0x2A)
OTHER_CALL = ToolCallId(0x2B)
LEAVES = {CALL: "equipoise/gold/ada/tools/2a", OTHER_CALL: "equipoise/gold/ada/tools/2b"}


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_ns = 1_000 * NS_PER_S

    def __call__(self) -> int:
        return self.now_ns


class Book:
    """A hold book in memory, which looks at the world at the moment something is written down."""

    def __init__(self) -> None:
        self.entries: dict[int, Hold] = {}
        self.refuses = False
        self.before_each_deed: list[Hold] = []
        self.untouched = lambda hold: True

    def take(self, holds: Sequence[Hold]) -> tuple[Hold, ...]:
        if self.refuses:
            raise JournalError("journal: database or disk is full: free space on that file system")
        for hold in holds:
            assert self.untouched(hold), f"{hold.target} was touched before it was written down"
        numbered = tuple(replace(h, id=len(self.before_each_deed) + i + 1) for i, h in enumerate(holds))
        self.before_each_deed += numbered
        self.entries.update({h.id: h for h in numbered if h.id is not None})
        return numbered

    def extend(self, hold: Hold, expires_ns: int) -> Hold:
        if self.refuses:
            raise JournalError("journal: database or disk is full: free space on that file system")
        assert hold.id is not None
        self.entries[hold.id] = replace(hold, expires_ns=expires_ns)
        return self.entries[hold.id]

    def clear(self, holds: Iterable[Hold]) -> None:
        for hold in holds:
            if hold.id is not None:
                self.entries.pop(hold.id, None)


class KernelBudgets:
    """Budgets as the kernel keeps them, for processes that the test stops itself."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.hard_bytes: int | None = None

    def set_budget(self, tag: ToolCallId, /, *, soft_bytes: int, hard_bytes: int) -> None:
        if tag != CALL:
            raise LookupError(tag)
        self.hard_bytes = hard_bytes

    def processes(self, tag: ToolCallId, /) -> tuple[int, ...]:
        return self.pids if tag == CALL else ()

    def resume(self, tag: ToolCallId, /) -> int:
        for pid in self.pids:
            if (ref := processes.identify(pid)) is not None:
                processes.send(ref, signal.SIGCONT)
        return len(self.pids)


class World:
    """A fake v2 tree with two tool calls in leaves of their own."""

    def __init__(self, root: Path) -> None:
        self.tree = FakeTree(root, {"": "cpu memory pids"})
        for leaf in LEAVES.values():
            self.tree.populate(leaf, V2_FILES)
        self.clock = Clock()
        self.book = Book()
        self.book.untouched = self.untouched
        self.driver: CgroupDriver = self.tree.driver()
        self.holds = Holds(self.book, self.driver)
        self.actuator = Actuator(self.holds, self.driver, None, now_ns=self.clock)
        for call, leaf in LEAVES.items():
            self.actuator.bind(call, leaf=leaf)

    def do(self, action: ToolCallAction) -> Outcome:
        return self.actuator.execute(decided(action, self.clock.now_ns))

    def in_s(self, seconds: float) -> int:
        return self.clock.now_ns + int(seconds * NS_PER_S)

    def untouched(self, hold: Hold) -> bool:
        """That nothing of this kind is done to the target, apart from what another entry accounts for."""
        others = [h for h in self.book.entries.values() if h.same_target(hold)]
        return bool(others) or not self.done(hold.path or "", hold.kind)

    def done(self, leaf: str, kind: HoldKind) -> bool:
        file, idle = {
            freeze.FREEZE: ("cgroup.freeze", "0"),
            throttle.MEMORY_HIGH: ("memory.high", "max"),
            throttle.CPU_QUOTA: ("cpu.max", "max 100000"),
            HoldKind.ARMED: ("cgroup.freeze", "0"),
        }[kind]
        # A plain file keeps the tail of a longer text it held before, which no kernel file does.
        path = self.tree.root / leaf / file
        return path.exists() and not path.read_text().startswith(idle)


def decided(action: ToolCallAction | SwapIn, at_ns: int, trigger_ns: int | None = None) -> Decision:
    return Decision(
        DecisionId(f"d{at_ns}"), at_ns, "rule", 1.0, 0.9, "", action, TenantId("gold"), "gold/ada", "", (), trigger_ns
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def stopped(ref: ProcessRef) -> bool:
    found = processes.look(ref)
    return found is not None and found.stopped


def on_process(child: subprocess.Popen[bytes], book: Book, clock: Clock) -> tuple[Actuator, ProcessRef]:
    actuator = Actuator(Holds(book, None), None, KernelBudgets(child.pid), now_ns=clock)
    ref = processes.identify(child.pid)
    assert ref is not None
    return actuator, ref
