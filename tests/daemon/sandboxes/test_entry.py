"""What calls begin with as they come and go. The arithmetic is tested in policies/memory, the kernel in whole/."""

from __future__ import annotations

from dataclasses import replace

from equipoise.daemon.sandboxes.entry import NOTHING, EntryBudgets
from equipoise.policies.events import ToolCallEnded, ToolCallStarted
from equipoise.policies.model import MIB, ToolCallId, ToolCallSource
from equipoise.policies.policy import Budget, Mode
from equipoise.policies.state import State
from equipoise.tests.policies.facts import policy, state_with_a_call

TIGHT = policy(pool_mib=1200, budget=Budget(128 * MIB, 256 * MIB))


def started(state: State, id: int, *, exempt: bool = False) -> None:
    sandbox = next(iter(state.sandboxes))
    state.apply(ToolCallStarted(9, ToolCallId(id), sandbox, "make", ToolCallSource.LINEAGE, 0.9, exempt=exempt))


def test_the_more_calls_run_the_less_the_next_begins_with_and_a_few_that_end_change_nothing() -> None:
    state = state_with_a_call()
    state.policy = TIGHT
    entry = EntryBudgets(None, state)
    assert entry.keep_up() and entry.now() == (75 * MIB, 150 * MIB), "the one that runs, and the next"
    assert not entry.keep_up()
    started(state, 21)
    started(state, 22, exempt=True)
    assert entry.keep_up() and entry.now() == (50 * MIB, 100 * MIB), "one that has no budget takes no share"
    state.apply(ToolCallEnded(10, ToolCallId(21), 0, None))
    assert not entry.keep_up() and entry.now() == (50 * MIB, 100 * MIB)


def test_where_the_policy_only_observes_nothing_has_a_budget() -> None:
    state = state_with_a_call()
    state.policy = replace(TIGHT, mode=Mode.DRY_RUN)
    entry = EntryBudgets(None, state)
    assert not entry.keep_up() and entry.now() == NOTHING
