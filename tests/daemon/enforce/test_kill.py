"""Kills, against real processes."""

from __future__ import annotations

import signal

from equipoise.daemon.enforce.actuator import Actuator
from equipoise.daemon.enforce.holds import Holds
from equipoise.daemon.sandboxes import processes
from equipoise.policies.actions import Freeze, Kill, OutcomeStatus
from equipoise.policies.model import NS_PER_S

from ..conftest import Spawn, eventually
from .conftest import CALL, Book, Clock, KernelBudgets, decided, on_process


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
