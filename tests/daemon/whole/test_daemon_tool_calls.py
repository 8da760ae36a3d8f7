"""Tool calls of real agents under a real daemon: found, measured, stopped, answered, and their agents told."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.tests.fixtures.running_daemon import (
    CLI,
    MIB,
    RunningDaemon,
    end,
    eventually,
    grow,
    process_state,
    with_probes,
)

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
TOOL = (*CLI, "tool", "--")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("daemon")) as running:
        yield running


def only(daemon: RunningDaemon, containing: str):
    """The one tool call whose command says so, once it has ended."""

    def found():
        calls = [c for c in daemon.tool_calls(containing) if c.end_ns]
        return calls[0] if len(calls) == 1 else None

    return eventually(found)


def test_a_tool_call_is_found_by_lineage_alone(daemon):
    agent = daemon.agent(name="lineage")
    assert agent.call("sh", "-c", "sleep 0.1; exit 3 # by-lineage").returncode == 3
    call = only(daemon, "by-lineage")
    assert (call.source, call.tenant_id, call.sandbox) == ("lineage", "gold", "lineage")
    assert (call.exit_code, call.signal, call.phase) == (3, 0, "ended")
    assert call.session_id == "gold/lineage"
    assert call.end_ns - call.start_ns >= 100_000_000


def test_the_peak_is_that_of_the_tool_call_and_not_of_its_wrapper(daemon):
    agent = daemon.agent(name="peaks")
    assert agent.call(*TOOL, "sh", "-c", "exit 0 # tiny").returncode == 0
    assert agent.call(*TOOL, *grow(40, "'by-wrapper'")).returncode == 0
    tiny, grown = only(daemon, "tiny"), only(daemon, "by-wrapper")
    assert tiny.source == grown.source == "wrapper" and tiny.confidence == 1.0
    assert tiny.peak_bytes < 6 * MIB, "the wrapper is a Python with gRPC, of some 30 MiB"
    # 40 MiB held, one piece of 4 MiB twice, and the interpreter.
    assert 40 * MIB < grown.peak_bytes < 62 * MIB


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_the_wrapper_answers_with_the_exit_code_of_its_command(daemon, command, code):
    agent = daemon.agent(name=f"codes-{code}")
    assert agent.call(*TOOL, "sh", "-c", f"{command} # code-{code}").returncode == code
    call = only(daemon, f"code-{code}")
    assert (call.exit_code, call.signal) == ((0, code - 128) if code > 128 else (code, 0))


def test_the_wrapper_passes_signals_on(daemon, tmp_path):
    agent = daemon.agent(name="signals")
    trapped = tmp_path / "trapped"
    trap = f"trap 'echo got-it; exit 5' TERM; : > {trapped}"
    agent.begin(*TOOL, "sh", "-c", f"{trap}; while :; do sleep 0.05; done # passed-on")
    call = eventually(lambda: next((c for c in daemon.tool_calls("passed-on") if c.source == "wrapper"), None))
    wrapper = _parent(call.pid)
    eventually(trapped.exists)
    os.kill(wrapper, signal.SIGTERM)
    result = agent.result()
    assert (result.returncode, result.stdout) == (5, "got-it\n")


def test_a_wrapped_command_that_does_not_exist_is_one_line_and_127(daemon):
    result = daemon.agent(name="nonesuch").call(*TOOL, "no-such-command")
    assert result.returncode == 127
    assert result.stderr == "equipoise: no-such-command: no such command, or not executable\n"


def test_what_a_hook_announces_is_joined_with_the_process_that_the_kernel_sees(daemon):
    agent = daemon.agent(name="hooked")
    begun = daemon.sandboxes.BeginToolCall(
        sandbox_pb2.BeginToolCallRequest(
            tenant_id="gold", name="hooked", command="Bash: run the checks", external_id="toolu_1", session_id="talk"
        )
    )
    again = daemon.sandboxes.BeginToolCall(
        sandbox_pb2.BeginToolCallRequest(tenant_id="gold", name="hooked", external_id="toolu_1")
    )
    assert again.tool_call_id == begun.tool_call_id
    agent.call("sh", "-c", "sleep 0.2; exit 4 # under-a-hook")
    ended = daemon.sandboxes.EndToolCall(sandbox_pb2.EndToolCallRequest(external_id="toolu_1"))
    call = next(c for c in daemon.tool_calls() if c.tool_call_id == ended.tool_call_id)
    assert (call.source, call.command, call.session_id) == ("hook", "Bash: run the checks", "gold/talk")
    assert call.exit_code == 4 and call.pid, "the kernel knows what the hook does not"
    assert ended.peak_bytes == call.peak_bytes > 0 and ended.duration_ns >= 200_000_000
    assert not daemon.tool_calls("under-a-hook"), "it is one call, not two"


def test_a_hook_of_ours_that_the_agent_runs_is_no_tool_call_and_is_not_taken_for_the_announced_one(daemon):
    agent = daemon.agent(name="own-hook")
    hook = f"{sys.executable} -m equipoise.integrations.claude_code.hook </dev/null"
    begun = daemon.sandboxes.BeginToolCall(
        sandbox_pb2.BeginToolCallRequest(tenant_id="gold", name="own-hook", command="make", external_id="toolu_2")
    )
    agent.call("sh", "-c", f"{hook} || true")
    agent.call("sh", "-c", "exit 3 # the-announced-one")
    ended = daemon.sandboxes.EndToolCall(sandbox_pb2.EndToolCallRequest(external_id="toolu_2"))
    calls = {c.tool_call_id: c for c in daemon.tool_calls() if c.sandbox == "own-hook" and c.command != "true"}
    assert list(calls) == [ended.tool_call_id] and begun.tool_call_id
    assert calls[ended.tool_call_id].exit_code == 3, "the process that counts is the one after the hook"


def test_an_escapee_is_accounted_and_its_sandbox_goes_when_it_does(daemon):
    agent = daemon.agent(name="escape")
    escapee = f"{sys.executable} -S -c 'x = bytearray(b\"x\" * (30 << 20)); import time; time.sleep(60)'"
    agent.call("sh", "-c", f"setsid {escapee} >/dev/null 2>&1 & echo $!; : leaves-one-behind")
    call = only(daemon, "leaves-one-behind")
    assert call.escaped_count == 1 and call.phase == "ended"
    eventually(lambda: only(daemon, "leaves-one-behind").used_bytes > 25 * MIB)
    assert agent.leave() == 0
    time.sleep(0.3)
    assert any(s.name == "escape" for s in daemon.watch().sandboxes), "it is in use"
    [pid] = [int(p) for p in _processes_below(f"{daemon.base}/gold/escape")]
    end(pid)
    eventually(lambda: all(s.name != "escape" for s in daemon.watch().sandboxes))
    assert not _cgroups_of(f"{daemon.base}/gold/escape")
    assert only(daemon, "leaves-one-behind").used_bytes == 0


def test_a_call_at_its_budget_is_stopped_granted_and_goes_on_without_a_loss(daemon):
    agent = daemon.agent(name="granted")
    result = agent.call(*TOOL, *grow(100, "print(sum(map(len, held)) >> 20, 'granted-one')"))
    assert result.returncode == 0 and result.stdout == "grown\n100 granted-one\n"
    assert "granted up to 128 MiB" in result.stderr and result.stderr.startswith("Equipoise: ")
    call = only(daemon, "granted-one")
    assert call.hard_bytes // MIB == 128 and 0 <= call.overshoot_bytes < MIB
    [told] = daemon.decisions(call.tool_call_id)
    assert told.action == "grant 128 MiB" and told.outcome == "completed" and told.tier == "kernel budget"
    assert "MiB" in told.evidence and 0 < told.latency_ms < 1000


def test_a_runaway_alone_is_killed_and_its_agent_lives_and_is_told_why(daemon):
    agent, neighbour = daemon.agent(name="runaway"), daemon.agent("silver", "neighbour")
    neighbour.begin(*grow(30, "time.sleep(2)  # beside-it"))
    agent.begin(*TOOL, *grow(4000, "'wild'"))
    result = agent.result()
    assert result.returncode == 137 and "grown" not in result.stdout
    assert "ended this tool call" in result.stderr and "192 MiB" in result.stderr and result.stderr.count("\n") == 1
    assert agent.call("echo", "still here").stdout == "still here\n"
    assert neighbour.result().returncode == 0
    call = only(daemon, "wild")
    assert call.signal == 9 and call.overshoot_bytes < MIB and call.peak_bytes < 193 * MIB
    assert any(action.startswith("kill the tool call: done") for action in call.actions)
    (seen,) = call.facts
    assert seen.startswith("SIGKILL to pid ") and seen.endswith(f"(pid {daemon.process.pid})"), seen
    shown = daemon.cli("explain", call.tool_call_id[-8:])
    assert shown.returncode == 0 and "because  tool call at the largest budget" in shown.stdout


def test_a_tool_call_with_a_family_is_killed_with_all_of_it(daemon):
    agent = daemon.agent(name="family")
    inner = f"{sys.executable} -S -c 'import time; time.sleep(60)' & "
    result = agent.call("sh", "-c", f": whole-family; setsid {inner} {inner} {shlex.join(grow(4000))}")
    assert result.returncode == -signal.SIGKILL
    only(daemon, "whole-family")
    eventually(lambda: _processes_below(f"{daemon.base}/gold/family/tools") == [])
    assert process_state(agent.pid) in "SR"


def test_an_intent_raises_the_budget_of_the_next_call_of_its_kind(daemon):
    agent = daemon.agent(name="intent")
    result = agent.call(*CLI, "tool", "--tenant", "gold", "--name", "intent", "--expect-memory", "160MiB", "--",
                        *grow(100, "'as-declared'"))  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", "nothing had to be granted"
    call = only(daemon, "as-declared")
    assert call.hard_bytes == 160 * MIB and not daemon.decisions(call.tool_call_id)


def test_agents_that_compete_for_a_small_pool_take_turns(tmp_path):
    policy = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: narrow}
spec:
  tenants: {gold: {weight: 2}, silver: {weight: 1}}
  memory:
    toolPool: 160MiB
    budget: {soft: 48MiB, hard: 64MiB, step: 64MiB, max: 192MiB, bends: false}
    maxWait: 20s
"""
    daemon = RunningDaemon(tmp_path, policy)
    try:
        daemon.start()
        first, second = daemon.agent("gold", "one"), daemon.agent("silver", "two")
        enough = tmp_path / "enough"
        stays = f"from pathlib import Path\nwhile not Path({str(enough)!r}).exists(): time.sleep(0.05)  # came-first"
        first.begin(*grow(90, stays))
        eventually(lambda: sum(c.used_bytes for c in daemon.tool_calls("came-first")) > 90 * MIB)
        second.begin(*TOOL, *grow(90, "time.sleep(0.1)  # came-second"))
        eventually(lambda: "wait for memory" in [d.action for d in daemon.decisions()])
        time.sleep(0.6)
        assert not any(c.end_ns for c in daemon.tool_calls("came-second")), "it stands until the first has ended"
        enough.touch()
        assert first.result().returncode == 0 and second.result().returncode == 0
        call = only(daemon, "came-second")
        actions = [d.action for d in reversed(daemon.decisions(call.tool_call_id))]
        assert actions == ["wait for memory", "grant 128 MiB"], "it stood until the first had ended"
        assert call.stalled_ns > 500_000_000
    finally:
        daemon.close()


@pytest.mark.parametrize("mode", ["observe", "dry-run"])
def test_what_does_not_enforce_does_nothing(tmp_path, mode):
    daemon = RunningDaemon(tmp_path)
    daemon.policy.write_text(daemon.policy.read_text().replace("mode: enforce", f"mode: {mode}"))
    try:
        daemon.start()
        result = daemon.agent().call(*TOOL, *grow(250, "'just-watched'"))
        assert result.returncode == 0 and result.stderr == ""
        call = only(daemon, "just-watched")
        assert call.peak_bytes > 250 * MIB and call.stalled_ns == 0 and call.hard_bytes == 0
        decided = [(d.action, d.outcome) for d in reversed(daemon.decisions(call.tool_call_id))]
        would = ("grant 128 MiB", "grant 192 MiB", "kill the tool call") if mode == "dry-run" else ()
        assert decided == [(action, "dry-run") for action in would]
    finally:
        daemon.close()


def _parent(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def _cgroups_of(path: str) -> list[Path]:
    """In every hierarchy."""
    return [p for p in Path("/sys/fs/cgroup").glob(f"*/{path}") if p.is_dir()]


def _processes_below(path: str) -> list[str]:
    return [pid for top in Path("/sys/fs/cgroup").glob(f"unified/{path}") for file in top.rglob("cgroup.procs")
            for pid in file.read_text().split()]  # fmt: skip
