"""Soft and hard budgets, enforced in the kernel; and that nobody is stopped when nobody listens."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from equipoise.ebpf.libbpf import RingBuffer
from equipoise.policies.events import BudgetLevel, BudgetReached, EventsLost

pytestmark = pytest.mark.kernel
MIB = 1 << 20

GROW = "x = []\\nfor _ in range(100): x.append(bytearray(1 << 20))"


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def reached(bench, level):
    return [e for e in bench.events if isinstance(e, BudgetReached) and e.level is level]


def stopped_processes(bench, tag):
    return [pid for pid in bench.tools.processes(tag) if state_of(pid) == "T"]


def test_at_its_hard_budget_a_tool_call_stops_within_a_mebibyte_and_goes_on_when_granted(bench):
    agent, _ = bench.agent(f"sys.exit(run('{GROW}'))", hard_bytes=40 * MIB)
    bench.wait(lambda: reached(bench, BudgetLevel.HARD), "the hard budget")
    (event,) = reached(bench, BudgetLevel.HARD)
    call = bench.started()[0]
    assert (event.id, event.budget_bytes, event.pid) == (call.id, 40 * MIB, call.pid)
    assert call.hard_bytes == 40 * MIB
    bench.wait(lambda: state_of(call.pid) == "T", "the stop")
    usage = bench.tools.usage(call.id)
    assert 0 < usage.used_bytes - 40 * MIB < MIB
    assert usage.stalled_since_ns == pytest.approx(event.at_ns, abs=50_000_000), "the same stop"
    assert state_of(agent.pid) == "S", "its agent waits for it, not stopped"

    bench.tools.set_budget(call.id, soft_bytes=0, hard_bytes=80 * MIB)
    assert bench.tools.resume(call.id) == 1
    bench.wait(lambda: len(reached(bench, BudgetLevel.HARD)) == 2, "the next hard budget")
    bench.wait(lambda: state_of(call.pid) == "T", "the next stop")
    assert bench.tools.usage(call.id).used_bytes - 80 * MIB < MIB

    bench.tools.set_budget(call.id, soft_bytes=0, hard_bytes=0)
    bench.tools.resume(call.id)
    bench.finish(agent)
    assert agent.returncode == 0
    assert bench.ended(call.id).peak_bytes > 100 * MIB


@pytest.mark.parametrize("threads", [1, 4])
def test_overshoot_stays_below_a_mebibyte_with_threads(bench, threads):
    code = (
        "import threading\n"
        "def grow():\n"
        "    x = bytearray(0)\n"
        "    keep = [bytearray(1 << 16) for _ in range(4000)]\n"
        f"ts = [threading.Thread(target=grow) for _ in range({threads})]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
    )
    _agent, _ = bench.agent(f"run({code!r})", hard_bytes=128 * MIB)
    bench.wait(lambda: reached(bench, BudgetLevel.HARD), "the hard budget")
    call = bench.started()[0]
    bench.wait(lambda: state_of(call.pid) == "T", "the stop")
    assert bench.tools.usage(call.id).peak_bytes - 128 * MIB < MIB
    bench.tools.kill(call.id)


def test_siblings_stop_when_they_charge_next_and_all_continue_together(bench):
    code = (
        "import os\nfor _ in range(3): os.fork()\nx = bytearray(0)\nkeep = [bytearray(1 << 16) for _ in range(320)]\n"
    )
    agent, _ = bench.agent(f"run({code!r}); print('done')", hard_bytes=64 * MIB)
    bench.wait(bench.started, "the tool call")
    call = bench.started()[0]
    bench.wait(lambda: len(stopped_processes(bench, call.id)) == 8, "all eight processes stopped")
    bench.tick()
    assert len(reached(bench, BudgetLevel.HARD)) == 1, "one event, however many processes stop"
    assert bench.tools.usage(call.id).peak_bytes - 64 * MIB < MIB
    bench.tools.set_budget(call.id, soft_bytes=0, hard_bytes=1 << 30)
    assert bench.tools.resume(call.id) == 8
    assert bench.finish(agent) == "done\n"


def test_a_tool_call_that_is_stopped_can_be_killed_alone(bench):
    agent, _ = bench.agent(f"code = run('{GROW}'); print('agent goes on after', code)", hard_bytes=30 * MIB)
    bench.wait(lambda: reached(bench, BudgetLevel.HARD), "the hard budget")
    bench.tools.kill(bench.started()[0].id)
    assert bench.finish(agent) == "agent goes on after -9\n"


def test_continuing_without_a_grant_stops_it_again(bench):
    _agent, _ = bench.agent(f"run('{GROW}')", hard_bytes=30 * MIB)
    bench.wait(lambda: reached(bench, BudgetLevel.HARD), "the hard budget")
    call = bench.started()[0]
    bench.wait(lambda: state_of(call.pid) == "T", "the stop")
    before = bench.tools.usage(call.id).stop_count
    bench.tools.resume(call.id)
    bench.wait(lambda: bench.tools.usage(call.id).stop_count > before and state_of(call.pid) == "T", "another stop")
    assert bench.tools.usage(call.id).used_bytes - 30 * MIB < MIB
    bench.tools.kill(call.id)


def test_the_agents_own_process_is_never_stopped(bench):
    agent, tag = bench.agent("x = bytearray(60 << 20); print('grown', flush=True); os.read(0, 1)")
    bench.tools.set_budget(tag, soft_bytes=0, hard_bytes=20 * MIB)
    assert agent.stdout.readline() == b"grown\n"
    bench.wait(lambda: state_of(agent.pid) == "S", "the agent waiting for input, not stopped")
    assert bench.tools.usage(tag).used_bytes > 60 * MIB


def test_the_soft_budget_is_told_once_and_again_after_it_changed(bench):
    agent, _ = bench.agent(
        f"run('{GROW}\\nimport time; time.sleep(0.3); x.append(bytearray(8 << 20))')", soft_bytes=30 * MIB
    )
    bench.wait(lambda: reached(bench, BudgetLevel.SOFT), "the soft budget")
    call = bench.started()[0]
    bench.wait(lambda: bench.tools.usage(call.id).used_bytes > 100 * MIB, "more memory")
    assert len(reached(bench, BudgetLevel.SOFT)) == 1
    bench.tools.set_budget(call.id, soft_bytes=100 * MIB, hard_bytes=0)
    bench.finish(agent)
    first, second = reached(bench, BudgetLevel.SOFT)
    assert (first.budget_bytes, second.budget_bytes) == (30 * MIB, 100 * MIB)
    assert 30 * MIB < first.used_bytes < 31 * MIB


def test_the_soft_budget_is_armed_again_when_usage_falls_below_it(bench):
    code = "for _ in range(3): x = bytearray(60 << 20); del x"
    agent, _ = bench.agent(f"run('{code}')", soft_bytes=30 * MIB)
    bench.finish(agent)
    assert len(reached(bench, BudgetLevel.SOFT)) == 3


def test_a_stale_heartbeat_stops_nobody_and_is_counted(make_bench):
    bench = make_bench(heartbeat_timeout_ns=50_000_000)
    bench.beats = False
    agent = bench.waiting(f"sys.exit(run('{GROW}'))")
    bench.tools.register_agent(agent.pid, 1, hard_bytes=40 * MIB)
    bench.tools.beat()
    time.sleep(0.06)
    bench.release(agent)
    bench.finish(agent)
    assert agent.returncode == 0
    assert bench.tools.losses().stops_withheld_count > 0
    assert bench.ended(bench.started()[0].id).peak_bytes > 100 * MIB


def test_closing_the_probes_stops_nobody_afterwards(make_bench):
    bench = make_bench()
    agent, _ = bench.agent(f"os.read(0, 1); sys.exit(run('{GROW}'))", hard_bytes=40 * MIB)
    bench.tools.close()
    agent.stdin.write(b"y")
    agent.stdin.flush()
    assert agent.wait(timeout=20) == 0


def test_a_full_ring_is_counted_and_the_loss_is_an_event(make_bench):
    bench = make_bench(ring_bytes=4096, step_bytes=4096, step_shift=40)
    agent, _ = bench.agent("print(run('x = bytearray(20 << 20)'))")
    assert agent.stdout.readline() == b"0\n"  # nobody read the ring meanwhile
    bench.tick()
    assert sum(e.count for e in bench.events if isinstance(e, EventsLost)) == bench.tools.losses().events_count
    by_kind = dict(bench.tools.losses().events)
    assert by_kind["memory"] > 100


def test_what_was_lost_is_found_again(make_bench):
    bench = make_bench(ring_bytes=4096, step_bytes=4096, step_shift=40)
    agent, _ = bench.agent(
        "first = tool('x = bytearray(20 << 20); import time; time.sleep(60)'); time.sleep(0.5)\n"
        "second = tool('import time; time.sleep(60)', 'second')\n"
        "print(first.pid, second.pid, flush=True); second.wait()"
    )
    first, second = (int(pid) for pid in agent.stdout.readline().split())
    time.sleep(0.2)
    bench.events += bench.tools.drain()
    assert {call.pid for call in bench.started()} == {first}, "the second began while the ring was full"
    bench.wait(lambda: len(bench.started()) > 1, "the second is found")
    assert {call.pid for call in bench.started()} == {first, second}
    assert bench.started()[-1].command.endswith("time.sleep(60) second")
    assert os.getpgid(second) > 0


def test_an_end_that_was_lost_is_found_again_without_its_exit_code(make_bench):
    bench = make_bench(ring_bytes=4096, step_bytes=4096, step_shift=40)
    agent, _ = bench.agent("print(run('x = bytearray(20 << 20)'), flush=True); os.read(0, 1)")
    assert agent.stdout.readline() == b"0\n"
    bench.tick()
    (call,) = bench.started()
    assert bench.ended(call.id) is None
    bench.wait(lambda: bench.gone(call.id), "its end is found")
    ended = bench.ended(call.id)
    assert (ended.exit_code, ended.signal) == (None, None)
    assert ended.peak_bytes > 20 * MIB
    assert bench.gone(call.id)
    assert bench.tools.usage(call.id) is None
    told = len(bench.events)
    bench.settle()
    assert len(bench.events) == told, "it is told once"


def test_a_full_ring_is_read_in_parts_and_nothing_of_it_is_left_out(make_bench):
    bench = make_bench(step_bytes=4096, step_shift=40)
    agent, _ = bench.agent("print(run('x = bytearray(8 << 20)'), flush=True); os.read(0, 1)")
    assert agent.stdout.readline() == b"0\n"
    sizes = []
    ring = RingBuffer(bench.tools._probes.object.maps["events"], lambda data: sizes.append(len(data)), at_once=100)
    try:
        counts: list[int] = []
        while counts[-1:] != [0]:
            counts.append(ring.consume())
    finally:
        ring.close()
    assert set(counts[:-2]) == {100} and sum(counts) == len(sizes) > 1000
    assert bench.tools.losses().events_count == 0


def test_a_stop_that_was_lost_is_told_all_the_same(make_bench):
    """Otherwise the call would stand for ever: nobody answers it."""
    bench = make_bench(ring_bytes=4096, step_bytes=4096, step_shift=40)
    agent, _ = bench.agent(
        "first = tool('x = bytearray(20 << 20); import time; time.sleep(60)'); time.sleep(0.5)\n"
        "second = tool('x = bytearray(90 << 20); import time; time.sleep(60)')\n"
        "print(first.pid, second.pid, flush=True); second.wait()",
        hard_bytes=60 * MIB,
    )
    _, second = (int(pid) for pid in agent.stdout.readline().split())
    bench.wait(lambda: [e for e in bench.events if isinstance(e, BudgetReached)], "the stop is told")
    [stop] = [e for e in bench.events if isinstance(e, BudgetReached)]
    assert (stop.level, stop.budget_bytes, stop.pid) == (BudgetLevel.HARD, 60 * MIB, second)
    bench.settle()
    assert len([e for e in bench.events if isinstance(e, BudgetReached)]) == 1, "and once"
    bench.tools.set_budget(stop.id, soft_bytes=0, hard_bytes=200 * MIB)
    assert bench.tools.resume(stop.id) == 1


def test_the_end_of_a_root_that_was_lost_is_found_while_others_of_its_call_live(make_bench):
    bench = make_bench(ring_bytes=4096, step_bytes=4096, step_shift=40)
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    agent, _ = bench.agent(f"print(run({code + '; x = bytearray(20 << 20)'!r}), flush=True); os.read(0, 1)")
    assert agent.stdout.readline() == b"0\n"
    bench.wait(lambda: bench.started() and bench.ended(bench.started()[0].id), "its end is found")
    (call,) = bench.started()
    assert bench.ended(call.id).escaped_count == 1 and not bench.gone(call.id)
    assert len(bench.tools.processes(call.id)) == 1
