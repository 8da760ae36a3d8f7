"""Processes by identity: a reused pid is never signalled."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from equipoise.daemon.sandboxes import processes
from equipoise.daemon.sandboxes.cgroups import Effect
from equipoise.daemon.sandboxes.processes import ProcessRef

from ..conftest import Spawn, eventually


def test_a_signal_reaches_the_process_it_was_meant_for(spawn: Spawn) -> None:
    child = spawn()
    ref = processes.identify(child.pid)
    assert ref is not None and processes.send(ref, signal.SIGSTOP).done
    assert eventually(lambda: (s := processes.look(ref)) is not None and s.stopped)
    assert processes.send(ref, signal.SIGKILL).done
    assert child.wait(5) == -signal.SIGKILL


def test_a_pid_that_belongs_to_another_process_by_now_is_left_alone(spawn: Spawn) -> None:
    child = spawn()
    ref = processes.identify(child.pid)
    assert ref is not None
    earlier = ProcessRef(child.pid, ref.start_ticks - 1)
    assert processes.send(earlier, signal.SIGKILL).effect is Effect.GONE
    assert processes.look(earlier) is None
    assert child.poll() is None, "the process that has the pid now lives on"


def test_a_process_that_ended_is_an_outcome(spawn: Spawn) -> None:
    child = spawn("pass")
    ref = processes.identify(child.pid)
    assert ref is not None
    # A zombie first (nobody waited yet), nothing at all after.
    assert eventually(lambda: processes.identify(child.pid) is None)
    assert processes.send(ref, signal.SIGTERM).effect is Effect.GONE
    child.wait(5)
    assert processes.send(ref, signal.SIGTERM).effect is Effect.GONE
    assert processes.descendants(child.pid) == ()


def test_a_command_name_with_parentheses_does_not_confuse_the_reading(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    tail = "S 7 42 42 0 -1 4194304 1 0 0 0 1 2 0 0 20 0 1 0 98765 1000 200"
    (tmp_path / "42/stat").write_text(f"42 (evil) R 1 (x) {tail}\n")
    found = processes.stat(42, tmp_path)
    assert found is not None and (found.state, found.parent_pid, found.start_ticks) == ("S", 7, 98765)


def test_descendants_are_found_parents_first(spawn: Spawn) -> None:
    child = spawn("import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()")
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        assert processes.descendants(child.pid) == (child.pid, grandchild)
        assert processes.descendants(os.getpid())[0] == os.getpid()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_resident_memory_of_the_gone_counts_nothing(spawn: Spawn) -> None:
    child = spawn()
    assert eventually(lambda: processes.resident_bytes([child.pid]) > 1 << 20)
    child.kill()
    child.wait(5)
    assert processes.resident_bytes([child.pid]) == 0
