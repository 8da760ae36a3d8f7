"""Actions on tool calls: against a fake v2 tree, against real processes, and whatever the order they come in."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from equipoise.daemon.enforce.actuator import LONGEST_HOLD_NS, UNANSWERED_NS, WAIT_GRACE_NS, Actuator
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.errors import JournalError
from equipoise.daemon.observe.journal.hold import Hold, HoldCause, HoldKind
from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.daemon.sandboxes.processes import ProcessRef
from equipoise.policies.actions import (
    Decision,
    Freeze,
    Grant,
    Kill,
    Outcome,
    OutcomeStatus,
    SwapIn,
    Thaw,
    Throttle,
    ToolCallAction,
    Wait,
)
from equipoise.policies.events import BudgetLevel, BudgetReached
from equipoise.policies.model import MIB, NS_PER_S, DecisionId, EngineId, SessionId, TenantId, ToolCallId
from hypothesis import given, settings
from hypothesis import strategies as st

from ..conftest import V2_FILES, FakeTree, Spawn, eventually

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
            HoldKind.FREEZE: ("cgroup.freeze", "0"),
            HoldKind.MEMORY_HIGH: ("memory.high", "max"),
            HoldKind.CPU_QUOTA: ("cpu.max", "max 100000"),
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


def test_a_throttle_lowers_memory_high_and_its_expiry_restores_it(world: World) -> None:
    # As many digits as the throttle's: a plain file keeps the tail of a longer text, a kernel file does not.
    (world.tree.root / LEAVES[CALL] / "memory.high").write_text("9999999\n")
    world.book.untouched = lambda hold: world.tree.read(f"{LEAVES[CALL]}/memory.high") == "9999999"
    outcome = world.do(Throttle(CALL, 1234567, 0.2, world.in_s(10)))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "cgroup-v2 memory.high")
    assert world.tree.read(f"{LEAVES[CALL]}/memory.high") == "1234567"
    (entry,) = world.book.entries.values()
    assert entry.restore == "9999999" and entry.expires_ns == world.in_s(10)
    world.clock.now_ns = world.in_s(10)
    (expired,) = world.actuator.expire(world.clock.now_ns)
    assert expired.status is OutcomeStatus.EXPIRED and expired.decision == outcome.decision
    assert world.tree.read(f"{LEAVES[CALL]}/memory.high") == "9999999"
    assert not world.book.entries


def test_throttling_twice_extends_and_still_restores_the_first_limit(world: World) -> None:
    world.do(Throttle(CALL, 2000, 0.2, world.in_s(10)))
    world.clock.now_ns = world.in_s(5)
    world.do(Throttle(CALL, 1000, 0.2, world.in_s(10)))
    (entry,) = world.book.entries.values()
    assert entry.restore == "max" and entry.expires_ns == world.in_s(10)
    world.clock.now_ns = world.in_s(6)
    assert world.actuator.expire(world.clock.now_ns) == ()


def test_a_host_without_memory_high_is_throttled_by_cpu_quota(world: World) -> None:
    (world.tree.root / LEAVES[CALL] / "memory.high").unlink()
    outcome = world.do(Throttle(CALL, 1000, 0.25, world.in_s(10)))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "cgroup-v2 cpu quota")
    assert world.tree.read(f"{LEAVES[CALL]}/cpu.max") == "25000 100000"


def test_a_call_without_a_cgroup_of_its_own_is_not_throttled_with_its_agent(world: World) -> None:
    outcome = world.do(Throttle(ToolCallId(99), 1000, 0.2, world.in_s(1)))
    assert outcome.status is OutcomeStatus.REJECTED and "no cgroup of its own" in outcome.detail


def test_a_thaw_undoes_throttle_and_freeze_before_they_expire(world: World) -> None:
    world.do(Throttle(CALL, 1000, 0.2, world.in_s(10)))
    world.do(Freeze(CALL, world.in_s(10)))
    assert world.do(Thaw(CALL)).status is OutcomeStatus.COMPLETED
    assert not world.book.entries and not world.done(LEAVES[CALL], HoldKind.FREEZE)
    assert world.do(Thaw(CALL)).status is OutcomeStatus.GONE


def test_a_hold_is_clipped_to_the_longest_that_is_allowed(world: World) -> None:
    outcome = world.do(Freeze(CALL, world.in_s(3600)))
    assert outcome.status is OutcomeStatus.CLIPPED
    (entry,) = world.book.entries.values()
    assert entry.expires_ns == world.clock.now_ns + LONGEST_HOLD_NS


def test_an_action_that_has_expired_already_is_not_begun(world: World) -> None:
    assert world.do(Freeze(CALL, world.clock.now_ns)).status is OutcomeStatus.EXPIRED
    assert not world.book.before_each_deed and not world.done(LEAVES[CALL], HoldKind.FREEZE)


def test_what_cannot_be_written_down_is_not_done(world: World) -> None:
    world.book.refuses = True
    for action in (Freeze(CALL, world.in_s(1)), Throttle(CALL, 1000, 0.2, world.in_s(1))):
        outcome = world.do(action)
        assert (outcome.status, outcome.tier) == (OutcomeStatus.FAILED, "journal")
    assert not world.done(LEAVES[CALL], HoldKind.FREEZE) and not world.done(LEAVES[CALL], HoldKind.MEMORY_HIGH)
    assert world.actuator.failed_count == 2
    assert not world.actuator.arm("equipoise/gold/ada")


def test_a_deed_that_fails_leaves_no_hold(world: World) -> None:
    freeze = world.tree.root / LEAVES[CALL] / "cgroup.freeze"
    freeze.unlink()
    freeze.symlink_to("/dev/full")  # refuses every write; must not be read, it never ends
    world.book.untouched = lambda hold: True
    outcome = world.do(Freeze(CALL, world.in_s(1)))
    assert outcome.status is OutcomeStatus.FAILED and "No space left" in outcome.detail
    freeze.unlink()
    freeze.write_text("0")
    world.clock.now_ns = world.in_s(2)
    world.actuator.expire(world.clock.now_ns)
    assert not world.book.entries


def test_actions_on_a_vanished_cgroup_say_gone_and_hold_nothing(world: World) -> None:
    world.actuator.bind(OTHER_CALL, leaf="equipoise/gold/ada/tools/vanished")
    for action in (
        Freeze(OTHER_CALL, world.in_s(1)),
        Throttle(OTHER_CALL, 1, 0.2, world.in_s(1)),
        Kill(OTHER_CALL, ""),
    ):
        assert world.do(action).status is OutcomeStatus.GONE
    assert not world.book.entries


def test_merged_ids_mean_the_same_call_and_keep_its_holds(world: World) -> None:
    tag = ToolCallId(0x77)
    world.do(Freeze(CALL, world.in_s(10)))
    world.actuator.merge(CALL, tag)
    assert world.do(Thaw(tag)).status is OutcomeStatus.COMPLETED
    world.do(Freeze(tag, world.in_s(10)))
    assert world.done(LEAVES[CALL], HoldKind.FREEZE)
    world.actuator.unbind(CALL)
    assert not world.done(LEAVES[CALL], HoldKind.FREEZE) and not world.book.entries


def test_a_budget_freeze_survives_the_thaw_of_another_freeze(world: World) -> None:
    world.do(Freeze(CALL, world.in_s(10)))
    world.holds.take(
        Hold(HoldKind.FREEZE, HoldCause.BUDGET, world.clock.now_ns, world.in_s(30), CALL, path=LEAVES[CALL])
    )
    world.do(Thaw(CALL))
    assert world.done(LEAVES[CALL], HoldKind.FREEZE), "it still stands at its budget"


def test_the_latency_counts_from_what_triggered_the_decision(world: World) -> None:
    outcome = world.actuator.execute(decided(Thaw(CALL), world.clock.now_ns - 5, trigger_ns=world.clock.now_ns - 900))
    assert outcome.latency_ns == 900


def test_engine_actions_are_a_mistake_here(world: World) -> None:
    with pytest.raises(TypeError, match="SwapIn is for an engine"):
        world.actuator.execute(decided(SwapIn(EngineId("e"), SessionId("s"), 1), 1))


def test_an_armed_sandbox_is_written_down_once_and_stays_so_after_a_release(world: World) -> None:
    assert world.actuator.arm("equipoise/gold/ada") and world.actuator.arm("equipoise/gold/ada")
    world.do(Freeze(CALL, world.in_s(10)))
    assert world.actuator.release_all() == 0
    assert [h.kind for h in world.book.entries.values()] == [HoldKind.ARMED]
    assert world.actuator.release_all(ending=True) == 0
    assert not world.book.entries


# -- real processes


def stopped(ref: ProcessRef) -> bool:
    found = processes.look(ref)
    return found is not None and found.stopped


def on_process(child: subprocess.Popen[bytes], book: Book, clock: Clock) -> tuple[Actuator, ProcessRef]:
    actuator = Actuator(Holds(book, None), None, KernelBudgets(child.pid), now_ns=clock)
    ref = processes.identify(child.pid)
    assert ref is not None
    return actuator, ref


def test_without_a_leaf_a_freeze_stops_exactly_its_processes_until_it_expires(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    outcome = actuator.execute(decided(Freeze(CALL, clock.now_ns + NS_PER_S), clock.now_ns))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "signal")
    assert eventually(lambda: stopped(ref))
    assert [h.process for h in book.entries.values()] == [ref]
    clock.now_ns += NS_PER_S
    assert [o.status for o in actuator.expire(clock.now_ns)] == [OutcomeStatus.EXPIRED]
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_freeze_that_cannot_be_written_down_stops_nobody(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    book.refuses = True
    outcome = actuator.execute(decided(Freeze(CALL, clock.now_ns + NS_PER_S), clock.now_ns))
    assert outcome.status is OutcomeStatus.FAILED and not stopped(ref)


def test_a_grant_raises_the_budget_and_lets_it_go_on(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    assert len(book.entries) == 1
    outcome = actuator.execute(decided(Grant(CALL, 15 * MIB, 20 * MIB), clock.now_ns))
    assert (outcome.status, outcome.tier) == (OutcomeStatus.COMPLETED, "kernel budget")
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_grant_to_a_call_that_has_ended_is_an_outcome(spawn: Spawn) -> None:
    actuator, _ = on_process(spawn(), Book(), clock := Clock())
    outcome = actuator.execute(decided(Grant(OTHER_CALL, 1, 2), clock.now_ns))
    assert outcome.status is OutcomeStatus.GONE


def test_a_wait_ends_in_a_larger_budget_if_nothing_else_is_decided(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    budgets = KernelBudgets(child.pid)
    actuator = Actuator(Holds(book, None), None, budgets, now_ns=clock)
    ref = processes.identify(child.pid)
    assert ref is not None
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    assert actuator.execute(decided(Wait(CALL, MIB, clock.now_ns + 5 * NS_PER_S), clock.now_ns)).status is (
        OutcomeStatus.COMPLETED
    )
    clock.now_ns += 5 * NS_PER_S
    assert actuator.expire(clock.now_ns) == (), "the policy's verdict at this moment comes first"
    clock.now_ns += WAIT_GRACE_NS
    assert [o.status for o in actuator.expire(clock.now_ns)] == [OutcomeStatus.EXPIRED]
    assert budgets.hard_bytes == 15 * MIB, "a runaway still meets a budget"
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_stop_that_nobody_answers_ends_by_itself(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, ref = on_process(child, book, clock)
    processes.send(ref, signal.SIGSTOP)
    actuator.stopped_at_budget(BudgetReached(1, CALL, BudgetLevel.HARD, 10 * MIB, 11 * MIB, child.pid))
    clock.now_ns += UNANSWERED_NS
    actuator.expire(clock.now_ns)
    assert eventually(lambda: not stopped(ref)) and not book.entries


def test_a_kill_ends_the_call_and_never_its_agent(spawn: Spawn) -> None:
    agent, tool, book, clock = spawn(), spawn(), Book(), Clock()
    actuator = Actuator(Holds(book, None), None, KernelBudgets(agent.pid, tool.pid), now_ns=clock)
    actuator.bind(CALL, agent_pid=agent.pid)
    outcome = actuator.execute(decided(Kill(CALL, "too large"), clock.now_ns))
    assert (outcome.status, outcome.tier, outcome.detail) == (OutcomeStatus.COMPLETED, "signal", "1 processes")
    assert tool.wait(5) == -signal.SIGKILL and agent.poll() is None


def test_a_stopped_call_can_be_killed_and_leaves_no_hold(spawn: Spawn) -> None:
    child, book, clock = spawn(), Book(), Clock()
    actuator, _ = on_process(child, book, clock)
    actuator.execute(decided(Freeze(CALL, clock.now_ns + NS_PER_S), clock.now_ns))
    assert actuator.execute(decided(Kill(CALL, ""), clock.now_ns)).status is OutcomeStatus.COMPLETED
    assert child.wait(5) == -signal.SIGKILL and not book.entries
    assert actuator.execute(decided(Kill(CALL, ""), clock.now_ns)).status is OutcomeStatus.GONE


def test_without_ebpf_or_cgroup_a_kill_takes_the_tree_below_the_root_process(spawn: Spawn) -> None:
    root = spawn("import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()")
    assert root.stdout is not None
    grandchild = processes.identify(int(root.stdout.readline()))
    assert grandchild is not None
    clock = Clock()
    actuator = Actuator(Holds(Book(), None), None, None, now_ns=clock)
    actuator.bind(CALL, pid=root.pid)
    assert actuator.execute(decided(Kill(CALL, ""), clock.now_ns)).status is OutcomeStatus.COMPLETED
    assert root.wait(5) == -signal.SIGKILL
    assert eventually(lambda: processes.look(grandchild) is None)


# -- whatever the order

CALLS = st.sampled_from(sorted(LEAVES))
SECONDS = st.floats(0.01, 300)


@st.composite
def deeds(draw: st.DrawFn) -> tuple[str, ToolCallId, float]:
    kind = draw(st.sampled_from(["throttle", "freeze", "thaw", "kill", "wait", "grant", "pass", "refuse", "accept"]))
    return kind, draw(CALLS), draw(SECONDS)


@settings(max_examples=60, deadline=None)
@given(st.lists(deeds(), max_size=25))
def test_nothing_is_ever_held_back_without_a_journal_entry_and_an_expiry(  # noqa: PLR0912 - one arm per deed
    sequence: list[tuple[str, ToolCallId, float]],
) -> None:
    with TemporaryDirectory() as root:
        world = World(Path(root))
        for kind, call, seconds in sequence:
            match kind:
                case "throttle":
                    world.do(Throttle(call, 4096, 0.1, world.in_s(seconds)))
                case "freeze":
                    world.do(Freeze(call, world.in_s(seconds)))
                case "thaw":
                    world.do(Thaw(call))
                case "kill":
                    world.do(Kill(call, "why"))
                case "wait":
                    world.do(Wait(call, 1, world.in_s(seconds)))
                case "grant":
                    world.do(Grant(call, 1, 2))
                case "pass":
                    world.clock.now_ns = world.in_s(seconds)
                    world.actuator.expire(world.clock.now_ns)
                case "refuse" | "accept":
                    world.book.refuses = kind == "refuse"
            assert {h.id for h in world.holds.all()} == set(world.book.entries)
            for leaf in LEAVES.values():
                for held in (HoldKind.FREEZE, HoldKind.MEMORY_HIGH, HoldKind.CPU_QUOTA):
                    if world.done(leaf, held):
                        entries = [h for h in world.book.entries.values() if h.path == leaf and h.kind is held]
                        assert entries, f"{held} on {leaf} without an entry"
                        assert all(
                            h.expires_ns is not None and h.expires_ns <= world.clock.now_ns + LONGEST_HOLD_NS
                            for h in entries
                        )
        world.clock.now_ns += LONGEST_HOLD_NS
        world.actuator.expire(world.clock.now_ns)
        assert not world.book.entries
        for leaf in LEAVES.values():
            assert not any(world.done(leaf, k) for k in (HoldKind.FREEZE, HoldKind.MEMORY_HIGH, HoldKind.CPU_QUOTA))
