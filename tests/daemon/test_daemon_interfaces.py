"""What the daemon offers to those who ask: health, reflection, status, lists, explanations, a stream, metrics."""

from __future__ import annotations

import json
import os
import stat
import time
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from equipoise.daemon.api.v1 import policy_pb2, sandbox_pb2
from equipoise.gpuctl.api.v1 import engine_pb2, engine_pb2_grpc
from equipoise.tests.fixtures.running_daemon import CLI, MIB, Agent, RunningDaemon, eventually, grow
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make cgroups")
    running = RunningDaemon(tmp_path_factory.mktemp("daemon"))
    try:
        yield running.start("--metrics-listen", "127.0.0.1:0")
    finally:
        running.close()


@pytest.fixture(scope="module")
def agent(daemon: RunningDaemon) -> Agent:
    """It has made a call that was granted memory, and one that was ended."""
    ada = daemon.agent("gold", "ada")
    ada.call(*CLI, "tool", "--", *grow(100, "'was-granted'"))
    ada.call(*CLI, "tool", "--", *grow(400, "'was-ended'"))
    return ada


def test_health_is_serving_for_the_whole_and_each_service(daemon):
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    services = ("", "equipoise.daemon.v1.SandboxService", "equipoise.daemon.v1.PolicyService",
                "equipoise.gpuctl.v1.EngineService")  # fmt: skip
    for service in services:
        answered = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answered.status == health_pb2.HealthCheckResponse.SERVING, service
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        stub.Check(health_pb2.HealthCheckRequest(service="nonesuch"), timeout=5)


def test_reflection_lists_the_services_and_describes_them(daemon):
    stub = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="equipoise.daemon.v1.SandboxService"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked), timeout=5)
    names = {service.name for service in listed.list_services_response.service}
    assert {"equipoise.daemon.v1.PolicyService", "equipoise.gpuctl.v1.EngineService", "grpc.health.v1.Health"} <= names
    assert b"RegisterSandbox" in described.file_descriptor_response.file_descriptor_proto[0]


def test_the_socket_is_for_its_owner_and_group_alone(daemon):
    mode = daemon.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660


def test_status_says_what_is_there_and_what_is_not(daemon):
    status = daemon.status()
    assert status.policy_name == "test" and status.cgroup_layout in ("hybrid", "v2")
    assert status.journal_path == str(daemon.state / "journal.sqlite")
    assert status.metrics_url.startswith("http://127.0.0.1:") and not status.engine_url
    assert status.ring_drop_count == status.failed_action_count == 0
    assert all("\n" not in line for line in status.lacks)


def test_tool_calls_are_listed_by_tenant_and_limit(daemon, agent):
    assert [(c.signal, "was-ended" in c.command) for c in daemon.tool_calls("was-")] == [(0, False), (9, True)]
    ask = daemon.policies.ListToolCalls
    assert not ask(policy_pb2.ListToolCallsRequest(tenant_id="silver")).tool_calls
    newest = ask(policy_pb2.ListToolCallsRequest(tenant_id="gold", limit=1)).tool_calls
    assert [c.tool_call_id for c in newest] == [daemon.tool_calls()[-1].tool_call_id]


def test_ps_prints_a_table_or_json(daemon, agent):
    running = daemon.cli("ps")
    assert running.stdout == "no tool calls\n"
    table = daemon.cli("ps", "--all").stdout.splitlines()
    assert table[0].split()[:4] == ["ID", "SANDBOX", "COMMAND", "FOUND"]
    assert len(table) == 1 + len(daemon.tool_calls()), "a line a call, though commands have several"
    listed = json.loads(daemon.cli("ps", "--all", "--json").stdout)
    ended = next(c for c in listed if "was-ended" in c["command"])
    assert ended["signal"] == 9 and ended["peak_bytes"] > 190 * MIB and ended["tenant_id"] == "gold"


def test_explain_narrows_down_and_says_why_and_what_came_of_it(daemon, agent):
    every = json.loads(daemon.cli("explain", "--json", "--limit", "100").stdout)
    kill = next(d for d in every if d["action"] == "kill the tool call")
    assert kill["rule"] == "tool call at the largest budget" and kill["outcome"] == "completed"
    assert kill["tier"] == "cgroup.kill" and kill["latency_ms"] > 0 and "192 MiB" in kill["evidence"]
    assert [d["at_ns"] for d in every] == sorted((d["at_ns"] for d in every), reverse=True), "newest first"
    assert not daemon.policies.Explain(policy_pb2.ExplainRequest(tenant_id="silver")).decisions
    [one] = daemon.policies.Explain(policy_pb2.ExplainRequest(decision_id=kill["decision_id"])).decisions
    assert one.rule == kill["rule"]
    granted = daemon.tool_calls("was-granted")[0]
    assert [d.action for d in daemon.decisions(granted.tool_call_id)] == ["grant 128 MiB"]
    assert daemon.cli("explain", granted.tool_call_id).stdout.startswith("grant 128 MiB  gold/ada python")


def test_watching_shows_the_state_again_and_again(daemon, agent):
    agent.begin(*grow(20, "time.sleep(1)  # watched"))
    stream = daemon.policies.Watch(policy_pb2.WatchRequest(interval_ms=100), timeout=10)
    seen = []
    for shown in stream:
        seen.append(shown)
        [sandbox] = [s for s in shown.sandboxes if s.name == "ada"]
        calls = [c for c in shown.tool_calls if "# watched" in c.command]
        if sandbox.memory_bytes > 20 * MIB and calls and calls[0].used_bytes > 20 * MIB:
            break
    stream.cancel()
    last = seen[-1]
    assert [s.now_ns for s in seen] == sorted({s.now_ns for s in seen})
    assert last.host.memory_total_bytes > last.host.memory_available_bytes > 0
    assert last.host.tool_pool_bytes == 1 << 30 and last.host.tool_used_bytes > 20 * MIB
    assert {t.tenant_id for t in last.tenants} == {"gold", "silver"}
    assert sandbox.agent_pid == agent.pid
    assert agent.result().returncode == 0


def test_an_engine_that_attaches_is_seen_and_told_the_weights(daemon):
    hello = engine_pb2.EngineReport(
        at_ns=time.monotonic_ns(),
        hello=engine_pb2.EngineHello(
            engine_id="e1", kind="fake", model="m", bytes_per_token=1000, device_capacity_tokens=64,
            supported_directives=["set_tenant_weight"],
        ),
    )  # fmt: skip
    ending: list[bool] = []

    session = engine_pb2.SessionKv(
        session_id="gold/ada", tenant_id="gold", tier=engine_pb2.KV_TIER_DEVICE, held_tokens=7
    )
    cost = engine_pb2.TurnCost(pte=43.06, duration_ns=30, ideal_ns=10)
    ended = engine_pb2.TurnEnded(session_id="gold/ada", turn_id="t1", cost=cost)

    def reports():
        yield hello
        yield engine_pb2.EngineReport(at_ns=time.monotonic_ns(), turn_ended=ended)
        yield engine_pb2.EngineReport(at_ns=time.monotonic_ns(), occupancy=engine_pb2.Occupancy(sessions=[session]))
        while not ending:
            time.sleep(0.05)

    stream = engine_pb2_grpc.EngineServiceStub(daemon.channel).Attach(reports())
    told = {}
    for directive in stream:
        told[directive.set_tenant_weight.tenant_id] = directive.set_tenant_weight.weight
        if len(told) == 2:
            break
    assert told == {"gold": 2.0, "silver": 1.0}
    [engine] = daemon.watch().engines
    assert (engine.engine_id, engine.kind, engine.attached) == ("e1", "fake", True)
    eventually(lambda: daemon.watch().sessions)
    table = daemon.cli("ps", "--sessions").stdout.splitlines()
    assert len(table) == 2 and "gold/ada" in table[1] and "not measured" in table[1]
    [cost] = json.loads(daemon.cli("ps", "--sessions", "--json").stdout)
    assert (cost["pte"], cost["energy_joules"], cost["slowdown_ratio"]) == (43.06, None, 3.0)
    assert json.loads(daemon.cli("ps", "--sessions", "--tenant", "silver", "--json").stdout) == []
    ending.append(True)
    stream.cancel()
    eventually(lambda: not daemon.watch().engines[0].attached)


def scrape(daemon: RunningDaemon) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name, then by labels."""
    with urllib.request.urlopen(daemon.status().metrics_url, timeout=5) as answer:
        text = answer.read().decode()
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_metrics_carry_base_units_and_no_unbounded_labels(daemon, agent):
    samples = scrape(daemon)
    ours = {name for name in samples if not name.startswith(("python_", "process_"))}
    assert ours and all(name.startswith("equipoise_") for name in ours)
    assert not {name for name in ours if any(unit in name for unit in ("_ms", "_ns", "_mib", "_kb", "milli"))}
    labels = {label for name in ours for key in samples[name] for label, _ in key}
    assert not labels & {"session", "sandbox", "tool_call", "id", "pid", "command", "engine_id"}


def test_metrics_count_what_happened(daemon, agent):
    samples = scrape(daemon)
    kinds = dict(samples["equipoise_tool_calls_total"])
    assert kinds[("kind", "python"), ("source", "wrapper")] >= 2
    assert samples["equipoise_budget_stops_total"][(("tenant", "gold"),)] >= 3
    assert samples["equipoise_outcomes_total"][(("status", "completed"),)] >= 3
    assert samples["equipoise_sandboxes"] == {(("tenant", "gold"),): 1.0, (("tenant", "silver"),): 0.0}
    assert samples["equipoise_host_memory_bytes"][(("state", "total"),)] == pytest.approx(
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.02
    )
    assert samples["equipoise_tool_call_duration_seconds_count"][(("tenant", "gold"),)] >= 2
    for lost in ("ring_drops", "failed_actions", "journal_lost_rows", "source_failures"):
        assert samples[f"equipoise_{lost}_total"][()] == 0, lost


def test_a_sandbox_can_be_made_ahead_and_registering_it_again_changes_nothing(daemon):
    request = sandbox_pb2.RegisterSandboxRequest(tenant_id="silver", name="ahead", session_id="mine")
    made = daemon.sandboxes.RegisterSandbox(request)
    assert made == daemon.sandboxes.RegisterSandbox(request) and made.session_id == "silver/mine"
    [shown] = [s for s in daemon.watch().sandboxes if s.name == "ahead"]
    assert shown.cgroup_id == made.cgroup_id and shown.cgroup_path == made.cgroup_path
    daemon.sandboxes.RemoveSandbox(sandbox_pb2.RemoveSandboxRequest(tenant_id="silver", name="ahead"))
    assert all(s.name != "ahead" for s in daemon.watch().sandboxes)
