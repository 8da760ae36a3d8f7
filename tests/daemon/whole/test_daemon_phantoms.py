"""No call runs on in the books when nothing of it is left, none counts twice, and nothing that holds memory hides."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from urllib.request import urlopen

import grpc
import pytest
from equipoise.daemon.api.v1 import sandbox_pb2
from equipoise.daemon.sandboxes.cgroups import CgroupDriver
from equipoise.daemon.sandboxes.entry import EntryBudgets
from equipoise.daemon.sandboxes.tool_calls import ToolCallKeeper
from equipoise.policies.events import Event, ProcessesGone, SandboxRegistered, ToolCallEnded, ToolCallStarted
from equipoise.policies.model import CgroupId, Sandbox, SessionId, TenantId, ToolCallId, ToolCallSource
from equipoise.policies.state import State
from equipoise.tests.fixtures.running_daemon import CLI, MIB, RunningDaemon, eventually, with_probes

TOOL = (*CLI, "tool", "--")
real = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("daemon"), "--metrics-listen", "127.0.0.1:0") as running:
        yield running


def begun(daemon: RunningDaemon, name: str, external_id: str):
    return daemon.sandboxes.BeginToolCall(
        sandbox_pb2.BeginToolCallRequest(tenant_id="gold", name=name, command=f"hook {name}", external_id=external_id)
    )


def test_a_call_whose_processes_are_gone_has_ended_though_nobody_said_how():
    """Its root became another sandbox's agent, say: the kernel tells of no exit then."""
    state = State()
    waiting: list[Event] = []
    entry = EntryBudgets(None, state)
    keeper = ToolCallKeeper({}, entry, None, None, state, waiting.append, lambda: 9, lambda pid: None)
    box = Sandbox(CgroupId(7), TenantId("gold"), "ada", "", SessionId("s"), None, 1)
    call = ToolCallId(5)
    waiting += [SandboxRegistered(1, box), ToolCallStarted(2, call, box.cgroup_id, "make", ToolCallSource.LINEAGE, 0.9)]
    waiting.append(ProcessesGone(8, call))
    seen: list[Event] = []
    while waiting:
        event = waiting.pop(0)
        seen.append(event)
        state.apply(event)
        keeper(event, state)
    assert seen[-1] == ToolCallEnded(9, call, None, None)
    known = state.tool_calls[call]
    assert not known.running and (known.exit_code, known.signal) == (None, None)
    state.check_integrity()


class TestRealCalls:
    pytestmark = real

    def test_a_call_without_an_end_ends_with_its_sandbox(self, daemon):
        daemon.sandboxes.RegisterSandbox(sandbox_pb2.RegisterSandboxRequest(tenant_id="gold", name="removed"))
        assert begun(daemon, "removed", "x1").tool_call_id
        daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="gold", name="removed"))
        [call] = daemon.tool_calls("hook removed")
        assert call.phase == "ended" and not call.HasField("exit_code") and not call.HasField("signal")

    def test_a_call_without_an_end_ends_with_its_agent_and_holds_no_sandbox(self, daemon):
        agent = daemon.agent("gold", "left")
        begun(daemon, "left", "x2")
        agent.leave()
        eventually(lambda: not daemon.watch().sandboxes)
        [call] = daemon.tool_calls("hook left")
        assert call.phase == "ended" and not call.HasField("exit_code")
        with pytest.raises(grpc.RpcError):
            daemon.sandboxes.EndToolCall(sandbox_pb2.EndToolCallRequest(external_id="x2", exit_code=0))

    def test_nobody_ends_another_sandboxs_call(self, daemon):
        agents = [daemon.agent("gold", name) for name in ("mine", "theirs")]
        mine, theirs = (begun(daemon, name, "same").tool_call_id for name in ("mine", "theirs"))

        def refused(request: sandbox_pb2.EndToolCallRequest) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as error:
                daemon.sandboxes.EndToolCall(request)
            return error.value.code()

        ask = partial(sandbox_pb2.EndToolCallRequest, tenant_id="gold", name="mine")
        unnamed = sandbox_pb2.EndToolCallRequest(external_id="same")
        assert refused(unnamed) == grpc.StatusCode.FAILED_PRECONDITION, "which of the two?"
        assert refused(ask(tool_call_id=theirs)) == grpc.StatusCode.NOT_FOUND
        assert refused(ask(external_id="other")) == grpc.StatusCode.NOT_FOUND
        assert {c.phase for c in daemon.tool_calls("hook ") if c.sandbox in ("mine", "theirs")} == {"running"}
        assert daemon.sandboxes.EndToolCall(ask(external_id="same", exit_code=3)).tool_call_id == mine
        assert [(c.tool_call_id, c.exit_code) for c in daemon.tool_calls("hook mine")] == [(mine, 3)]
        assert [c.phase for c in daemon.tool_calls("hook theirs")] == ["running"]
        for agent in agents:
            agent.leave()

    def test_a_wrapper_inside_a_call_does_not_end_it(self, daemon):
        agent = daemon.agent("gold", "nested")
        inner = shlex.join((*TOOL, "sh", "-c", "exit 4"))
        agent.begin(*TOOL, "sh", "-c", f"{inner}; echo $?; sleep 0.5; exit 3 # outer")
        result = agent.result()
        assert (result.returncode, result.stdout) == (3, "4\n")
        [call] = eventually(lambda: [c for c in daemon.tool_calls("# outer") if c.end_ns])
        assert call.exit_code == 3 and call.end_ns - call.start_ns > 500_000_000
        assert [c for c in daemon.tool_calls() if c.sandbox == "nested" and not c.end_ns] == []
        agent.leave()

    def test_a_sandbox_inside_a_sandbox_is_refused_and_leaves_nothing_running(self, daemon):
        agent = daemon.agent("gold", "outer")
        inner = (*CLI, "run", "--tenant", "gold", "--name", "inner", "--", "sh", "-c", "sleep 1")
        assert agent.call(*inner).returncode == 1
        assert agent.call(*TOOL, *inner).returncode == 1
        eventually(lambda: all(c.end_ns for c in daemon.tool_calls() if c.sandbox == "outer"))
        assert {s.name for s in daemon.watch().sandboxes} == {"outer"}
        agent.leave()

    def test_metrics_count_a_wrapped_call_once(self, daemon):
        def count() -> float:
            eventually(lambda: all(c.end_ns for c in daemon.tool_calls()))
            with urlopen(daemon.status().metrics_url) as answer:
                lines = answer.read().decode().splitlines()
            return sum(float(ln.rsplit(" ", 1)[1]) for ln in lines if ln.startswith("equipoise_tool_calls_total{"))

        agent = daemon.agent("gold", "counted")
        before = count()
        for _ in range(3):
            agent.call(*TOOL, "true")
            agent.call("true")
        assert count() - before == 6
        agent.leave()

    def test_what_outlives_its_call_and_holds_memory_is_listed(self, daemon):
        agent = daemon.agent("gold", "escape")
        holds = f"{sys.executable} -S -c 'x = bytearray(b\"x\" * (30 << 20)); import time; time.sleep(60)'"
        agent.call("sh", "-c", f"setsid {holds} >/dev/null 2>&1 & : left-one")
        eventually(lambda: any(c.used_bytes > 25 * MIB for c in daemon.tool_calls("left-one")))
        agent.call("sh", "-c", ": left-nothing")
        time.sleep(0.2)
        shown = daemon.cli("ps").stdout
        [left], [gone] = daemon.tool_calls("left-one"), daemon.tool_calls("left-nothing")
        assert left.tool_call_id in shown and "left behind" in shown and gone.tool_call_id not in shown
        assert gone.tool_call_id in daemon.cli("ps", "--all").stdout
        driver = CgroupDriver.open(base=daemon.base)
        driver.kill(f"{daemon.base}/gold/escape/tools")
        driver.close()
        eventually(lambda: left.tool_call_id not in daemon.cli("ps").stdout)
        agent.leave()
