"""The registry: every action has its rung, and every kind of hold that was ever written can be undone by one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import get_args

from equipoise.daemon.enforce import freeze, rungs, stop, throttle
from equipoise.daemon.enforce.guardian import release
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.observe.journal.hold import Hold, HoldCause, HoldKind, Needs
from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import Effect, Limit
from equipoise.daemon.sandboxes.processes import ProcessRef
from equipoise.policies.actions import ToolCallAction

from ..conftest import Spawn, eventually
from .conftest import CALL, LEAVES, World, stopped

SOON_NS = 60_000_000_000


def test_every_action_on_a_tool_call_is_carried_out_by_one_rung() -> None:
    carried_out = [deed.action for rung in rungs.RUNGS for deed in rung.deeds]
    assert sorted(carried_out, key=str) == sorted(get_args(ToolCallAction), key=str)


def test_every_kind_of_hold_is_undone_by_one_rung_and_says_what_its_record_needs() -> None:
    kinds = [kind for rung in rungs.RUNGS for kind in rung.undoes]
    assert sorted(kinds) == ["armed", "cpu quota", "freeze", "memory.high", "stop"], "as journals have them"
    assert all(kind.needs is not None for kind in kinds)
    limits = {kind: limit for rung in rungs.RUNGS for kind, limit in rung.limits.items()}
    assert limits == {throttle.MEMORY_HIGH: Limit.MEMORY_HIGH, throttle.CPU_QUOTA: Limit.CPU_QUOTA}


def test_holds_are_undone_from_the_kind_as_it_is_read_back(world: World) -> None:
    leaf = LEAVES[CALL]
    world.driver.set_memory_high(leaf, 4096)
    world.driver.set_cpu_quota(leaf, 0.1)
    world.driver.freeze(leaf)
    for kind, restore in (("memory.high", "9999"), ("cpu quota", "70000 100000"), ("freeze", None)):
        hold = Hold(HoldKind(kind), HoldCause("throttle"), 1, 2, CALL, path=leaf, restore=restore)
        assert rungs.undo(hold, world.driver).done
    assert world.tree.read(f"{leaf}/memory.high") == "9999"
    assert world.tree.read(f"{leaf}/cpu.max") == "70000 100000"
    assert world.tree.read(f"{leaf}/cgroup.freeze") == "0"


def test_a_record_that_no_rung_here_can_read_is_a_failure_and_the_others_are_undone(
    spawn: Spawn, journal: Journal
) -> None:
    child = spawn()
    ref = processes.identify(child.pid)
    assert ref is not None
    later = HoldKind("of 2049", Needs())
    journal.take([Hold(later, HoldCause("of 2049"), 1, SOON_NS, path="a/b")])
    journal.take([Hold(HoldKind("stop"), freeze.CAUSE, 1, SOON_NS, path="names no process")])
    journal.take([Hold(stop.STOP, freeze.CAUSE, 1, SOON_NS, process=ref)])
    os.kill(child.pid, signal.SIGSTOP)
    assert eventually(lambda: stopped(ref))
    result = release(journal.path, None)
    assert result.undone_count == 1 and eventually(lambda: not stopped(ref))
    assert result.failed == (
        "a/b: no rung here undoes 'of 2049'",
        "a hold of kind stop on path=names no process process=None",
    )
    assert [h.kind for h in journal.held()] == [later, "stop"]


def test_without_cgroups_a_hold_on_one_stays_and_one_on_a_process_does_not(tmp_path: Path) -> None:
    on_cgroup = Hold(freeze.FREEZE, freeze.CAUSE, 1, 2, CALL, path="a/b")
    assert rungs.undo(on_cgroup, None).effect is Effect.FAILED
    on_process = Hold(stop.STOP, freeze.CAUSE, 1, 2, CALL, process=ProcessRef(os.getpid(), 0))
    assert rungs.undo(on_process, None).effect is Effect.GONE
