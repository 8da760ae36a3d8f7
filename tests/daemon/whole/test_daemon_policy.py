"""A daemon's policy changes while it runs: by its file, by SIGHUP, by rpc; what is broken changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from equipoise.daemon.api.v1 import policy_pb2
from equipoise.tests.fixtures.running_daemon import CLI, MIB, RunningDaemon, eventually, grow, with_probes

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
DOCUMENT = """apiVersion: equipoise/v1
kind: Policy
metadata: {name: first}
spec:
  mode: enforce
  tenants: {gold: {weight: 2}}
  memory: {toolPool: 1GiB, budget: {soft: 48MiB, hard: 64MiB, step: 64MiB, max: 128MiB, bends: false}, maxWait: 60s}
"""
NARROW = DOCUMENT.replace("toolPool: 1GiB", "toolPool: 96MiB")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path, policy=DOCUMENT) as running:
        yield running


def named(daemon: RunningDaemon, name: str) -> bool:
    return daemon.status().policy_name == name


def test_an_edited_file_is_in_force_by_itself_and_a_broken_one_is_not(daemon: RunningDaemon) -> None:
    daemon.policy.write_text(DOCUMENT.replace("first", "second"))
    eventually(lambda: named(daemon, "second"))
    daemon.policy.write_text(DOCUMENT.replace("first", "third").replace("maxWait: 60s", "maxWait: 60"))
    eventually(lambda: daemon.status().policy_refused)
    assert named(daemon, "second")
    (said,) = daemon.status().policy_refused
    assert said == f"{daemon.policy}:7:113: spec.memory.maxWait: a bare number has no unit; write it as `10s`"
    assert "policy_refused" in daemon.said() and said in daemon.said()
    assert "the policy's files" in daemon.cli("doctor").stdout
    shown = daemon.cli("policy", "show", "--running", "--socket", str(daemon.socket))
    assert shown.stderr == f"equipoise: not in force: {said}\n" and "{name: second}" in shown.stdout
    assert shown.stdout.startswith(f"# from {daemon.policy}\n")
    layer = daemon.folder / "policies.d" / "mend.yaml"
    layer.parent.mkdir()
    layer.write_text("spec: {memory: {maxWait: 1s}}")
    eventually(lambda: named(daemon, "third"))
    assert not daemon.status().policy_refused


def test_sighup_has_the_files_read_at_once(daemon: RunningDaemon) -> None:
    assert daemon.process is not None
    daemon.policy.write_text(DOCUMENT.replace("first", "second"))
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: named(daemon, "second"))
    assert "why=SIGHUP" in daemon.said() or 'why="its files have changed"' in daemon.said()
    assert daemon.process.poll() is None


def test_a_daemon_in_a_terminal_reads_on_sighup_and_ends_with_its_terminal(tmp_path: Path) -> None:
    master, slave = os.openpty()
    name = os.ttyname(slave)
    os.close(slave)

    def take_terminal() -> None:
        os.setsid()
        os.close(os.open(name, os.O_RDWR))  # the first one that a session's leader opens is its terminal

    daemon = RunningDaemon(tmp_path)
    try:
        daemon.start(preexec_fn=take_terminal)
        assert daemon.process is not None
        daemon.policy.write_text(daemon.policy.read_text().replace("name: test", "name: second"))
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: named(daemon, "second"))
        os.close(master)
        master = -1
        assert daemon.process.wait(20) == 0
    finally:
        if master != -1:
            os.close(master)
        daemon.close()


def test_a_policy_is_applied_by_command_whole_or_not_at_all(daemon: RunningDaemon, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("spec: {tenants: {gold: {weight: 8}}}")
    words = ["--socket", str(daemon.socket), str(daemon.policy), str(over)]
    checked = daemon.cli("policy", "apply", "--check", *words)
    assert checked.stdout == "spec.tenants.gold.weight: 2.0 -> 8.0\n"
    assert daemon.watch().tenants[0].weight == 2
    assert daemon.cli("policy", "diff", "--socket", str(daemon.socket), str(daemon.policy)).stdout == "no difference\n"
    applied = daemon.cli("policy", "apply", "--json", *words)
    assert json.loads(applied.stdout)["changes"] == ["spec.tenants.gold.weight: 2.0 -> 8.0"]
    assert daemon.watch().tenants[0].weight == 8, "it is in force when the command answers"
    over.write_text("spec: {tenants: {gold: {weight: 0}}}")
    refused = daemon.cli("policy", "apply", *words)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"equipoise: {over}:1:33: spec.tenants.gold.weight: must be a number above 0 and at most 1000, found 0\n"
    )
    assert daemon.watch().tenants[0].weight == 8
    request = policy_pb2.ApplyPolicyRequest()
    request.texts.add(name="huge", text="spec:\n" + "".join(f"  key{n}: 1\n" for n in range(5000)))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.policies.ApplyPolicy(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(r"\nand 4\d\d\d more: `equipoise policy check`", caught.value.details() or "")
    assert daemon.cli("policy", "apply", "--socket", str(daemon.socket)).returncode == 0
    assert daemon.watch().tenants[0].weight == 2, "its own files again"


def test_new_budgets_hold_for_calls_that_run(daemon: RunningDaemon) -> None:
    agent = daemon.agent("gold", "runs")
    agent.begin(*grow(10, "__import__('time').sleep(60)  # held"))
    eventually(lambda: daemon.tool_calls("# held") and daemon.tool_calls("# held")[0].hard_bytes == 64 * MIB)
    daemon.policy.write_text(DOCUMENT.replace("hard: 64MiB", "hard: 100MiB"))
    eventually(lambda: daemon.tool_calls("# held")[0].hard_bytes == 100 * MIB)
    classes = "  toolCalls: {held: {match: {command: '# held'}, budget: {soft: 48MiB, hard: 120MiB}}}\n"
    daemon.policy.write_text(DOCUMENT + classes)
    eventually(lambda: daemon.tool_calls("# held")[0].hard_bytes == 120 * MIB)


def test_what_stands_at_its_budget_goes_on_when_the_policy_only_observes(daemon: RunningDaemon) -> None:
    daemon.policy.write_text(NARROW)
    eventually(lambda: daemon.watch().host.tool_pool_bytes == 96 * MIB)
    first, second = daemon.agent("gold", "first"), daemon.agent("gold", "second")
    first.begin(*grow(20, "__import__('time').sleep(60)  # holds"))
    eventually(lambda: any(c.used_bytes > 20 * MIB for c in daemon.tool_calls("# holds")))
    second.begin(*grow(90, "'went-on'  # stands"))
    eventually(lambda: any(c.phase == "stopped" for c in daemon.tool_calls("# stands")))
    daemon.policy.write_text(NARROW.replace("mode: enforce", "mode: observe"))
    assert second.result().returncode == 0
    assert daemon.status().policy_mode == "observe"


def test_a_rule_that_freezes_does_so_in_turns_and_the_agent_is_told(daemon: RunningDaemon) -> None:
    rule = "{when: tool pool above 40% for 0s, until: below 10%, do: freeze for 500ms}"
    narrow = DOCUMENT.replace("toolPool: 1GiB", f"ladder: [{rule}], toolPool: 128MiB")
    daemon.policy.write_text(narrow)
    eventually(lambda: daemon.watch().host.tool_pool_bytes == 128 * MIB)
    agent = daemon.agent("gold", "frozen")
    code = "end = time.monotonic() + 3\nwhile time.monotonic() < end: time.sleep(0.01)\nprint('through')  # frozen"
    done = agent.call(*CLI, "tool", "--", *grow(56, code))
    assert done.returncode == 0 and "through" in done.stdout
    assert "was frozen for a while because memory was short" in done.stderr
    call = daemon.tool_calls("# frozen")[0]
    frozen = [d for d in daemon.decisions(call.tool_call_id) if d.action == "freeze"]
    assert frozen and frozen[0].rule == "tool pool above 0.40 for 0s"
    assert 0 < call.stalled_ns < 0.7 * (call.end_ns - call.start_ns), "it runs as long as it stands"


def test_a_dry_run_is_marked_in_ps_explain_and_journal(daemon: RunningDaemon) -> None:
    daemon.policy.write_text(DOCUMENT.replace("mode: enforce", "mode: dry-run"))
    eventually(lambda: daemon.status().policy_mode == "dry-run")
    agent = daemon.agent("gold", "runs")
    agent.begin(*grow(160, "__import__('time').sleep(60)  # large"))
    eventually(lambda: any(c.would_be == "ended" for c in daemon.tool_calls("# large")))
    call = daemon.tool_calls("# large")[0]
    assert (call.phase, call.hard_bytes) == ("running", 0)
    assert daemon.decisions(call.tool_call_id)[0].action == "kill the tool call"
    assert all("dry-run" in action for action in call.actions)
    assert "running (would be ended)" in daemon.cli("ps", "--socket", str(daemon.socket)).stdout
