"""The Prometheus endpoint, scraped over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from equipoise.daemon.errors import ListenError
from equipoise.daemon.observe.metrics import MetricsFacts, MetricsServer
from equipoise.daemon.observe.tallies import KINDS, OTHER, Counts, Tallies
from equipoise.policies.actions import Decision, Kill, Outcome, OutcomeStatus
from equipoise.policies.events import (
    BudgetLevel,
    BudgetReached,
    DecisionMade,
    Event,
    EventsLost,
    OutcomeObserved,
    SandboxRegistered,
    ToolCallEnded,
    ToolCallMerged,
    ToolCallStarted,
)
from equipoise.policies.model import (
    CgroupId,
    CostModel,
    DecisionId,
    Engine,
    EngineId,
    EngineTotals,
    Host,
    KvTier,
    Sandbox,
    Session,
    SessionId,
    SessionPhase,
    Tenant,
    TenantId,
    ToolCall,
    ToolCallId,
    ToolCallSource,
)
from equipoise.policies.snapshot import Snapshot
from equipoise.policies.state import State
from prometheus_client.parser import text_string_to_metric_families

GOLD = TenantId("gold")
SANDBOX = Sandbox(CgroupId(4711), GOLD, "ada", "equipoise/gold/ada", SessionId("gold/ada"), None, 1, memory_bytes=1000)
CALL = ToolCall(
    ToolCallId(0xFEEDBEEF), GOLD, CgroupId(4711), SessionId("gold/ada"), "pytest", "pytest", ToolCallSource.HOOK, 1.0, 1
)
ENGINE = Engine(
    EngineId("engine-81"),
    "embedded",
    "smol",
    9,
    23053,
    4096,
    1 << 30,
    0,
    CostModel(),
    frozenset(),
    device_used_tokens=7,
)
SNAPSHOT = Snapshot(
    now_ns=5,
    host=Host(memory_total_bytes=100, memory_available_bytes=40, psi_some_ratio=0.25, psi_full_ratio=None),
    tenants=(Tenant(GOLD, 2.0), Tenant(TenantId("idle"))),
    sandboxes=(SANDBOX,),
    tool_calls=(CALL,),
    sessions=(
        Session(
            SessionId("gold/ada"), GOLD, EngineId("engine-81"), SessionPhase.IDLE, KvTier.DEVICE, 10, 10, host_bytes=5
        ),
    ),
    engines=(ENGINE,),
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Endpoint:
    def __init__(self) -> None:
        self.facts = MetricsFacts(SNAPSHOT, Counts(), version="9.9", policy="site", mode="dry-run", policy_refused=True)
        self.server = MetricsServer.start("127.0.0.1:0", lambda: self.facts)

    def scrape(self) -> Samples:
        with urlopen(self.server.url) as answer:
            text = answer.read().decode()
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.close()


def tallied(*events: Event) -> Counts:
    state, tallies = State(), Tallies()
    for event in (SandboxRegistered(1, SANDBOX), *events):
        state.apply(event)
        tallies(event, state)
    return tallies.read()


def started(number: int, command: str = "pytest -q") -> ToolCallStarted:
    return ToolCallStarted(1, ToolCallId(number), CgroupId(4711), command, ToolCallSource.HOOK, 1.0)


def test_a_scrape_shows_the_snapshot_in_base_units_by_tenant(endpoint: Endpoint) -> None:
    found = endpoint.scrape()
    gold = (("tenant", "gold"),)
    assert found["equipoise_sandbox_memory_bytes", gold] == 1000
    assert found["equipoise_tenant_weight", gold] == 2.0
    assert found["equipoise_tool_calls_running", (("phase", "running"), *gold)] == 1
    assert found["equipoise_kv_bytes", (*gold, ("tier", "device"))] == 230530
    assert found["equipoise_kv_bytes", (*gold, ("tier", "host"))] == 5
    assert found["equipoise_host_memory_bytes", (("state", "available"),)] == 40
    assert found["equipoise_host_memory_pressure_ratio", (("kind", "some"),)] == 0.25
    assert ("equipoise_host_memory_pressure_ratio", (("kind", "full"),)) not in found, "unknown is absent, not zero"
    assert found["equipoise_build_info", (("version", "9.9"),)] == 1
    assert found["equipoise_policy_info", (("mode", "dry-run"), ("name", "site"))] == 1
    assert found["equipoise_policy_refused", ()] == 1
    assert found["equipoise_sandboxes", (("tenant", "idle"),)] == 0, "an idle tenant's series stays"


def test_engine_totals_are_added_up_by_kind_and_model(endpoint: Endpoint) -> None:
    totals = EngineTotals(prefill_tokens=10, swap_out_count=1, swap_out_bytes=99, swap_out_ns=500_000_000)
    engines = tuple(
        Engine(EngineId(f"e{n}"), "embedded", "smol", n, 1, 100, 0, 0, CostModel(), frozenset(), n == 1, totals=totals)
        for n in range(2)
    )
    endpoint.facts = MetricsFacts(Snapshot(now_ns=5, engines=engines), Counts())
    found = endpoint.scrape()
    which = (("engine", "embedded"), ("model", "smol"))
    assert found["equipoise_engines_attached", which] == 1
    assert found["equipoise_engine_tokens_total", (*which, ("work", "prefill"))] == 20
    assert found["equipoise_engine_swap_seconds_total", (("direction", "out"), *which)] == 1.0
    assert found["equipoise_engine_kv_tokens", (*which, ("state", "capacity"))] == 100


def test_what_happened_is_counted(endpoint: Endpoint) -> None:
    decision = Decision(DecisionId("d"), 1, "runaway", 1, 1, "", Kill(ToolCallId(1), ""), GOLD, "s", "e")
    counts = tallied(
        started(1),
        started(2, "git status"),
        BudgetReached(2, ToolCallId(1), BudgetLevel.SOFT, 5, 5, 1),
        BudgetReached(2, ToolCallId(1), BudgetLevel.HARD, 5, 5, 1),
        DecisionMade(3, decision),
        OutcomeObserved(4, Outcome(DecisionId("d"), OutcomeStatus.COMPLETED, 4, "cgroup.kill")),
        ToolCallEnded(2_500_000_001, ToolCallId(1), None, 9),
        ToolCallEnded(3_500_000_001, ToolCallId(1), 0, None),
        ToolCallEnded(4, ToolCallId(2), 0, None),
        EventsLost(5, "ring", 3),
        EventsLost(6, "ring", 4),
    )
    endpoint.facts = MetricsFacts(SNAPSHOT, counts, ring_drop_count=7, late_event_count=2, failed_action_count=1)
    found = endpoint.scrape()
    assert found["equipoise_tool_calls_total", (("kind", "pytest"), ("source", "hook"))] == 1
    assert found["equipoise_tool_calls_total", (("kind", "git"), ("source", "hook"))] == 1
    assert found["equipoise_budget_stops_total", (("tenant", "gold"),)] == 1
    assert found["equipoise_decisions_total", (("rule", "runaway"),)] == 1
    assert found["equipoise_outcomes_total", (("status", "completed"),)] == 1
    labels = (("action", "kill"), ("status", "completed"), ("tenant", "gold"))
    assert found["equipoise_actions_total", labels] == 1
    assert found["equipoise_tool_call_duration_seconds_sum", (("tenant", "gold"),)] == 2.5
    assert found["equipoise_tool_call_duration_seconds_count", (("tenant", "gold"),)] == 2
    assert found["equipoise_events_lost_total", (("source", "ring"),)] == 7
    assert found["equipoise_ring_drops_total", ()] == 7
    assert found["equipoise_late_events_total", ()] == 2
    assert found["equipoise_failed_actions_total", ()] == 1


def test_a_wrapper_and_its_call_are_counted_as_one_and_so_are_a_hook_and_its_process(endpoint: Endpoint) -> None:
    """Each of three calls is begun twice and said to have ended by three."""
    events: list[Event] = []
    for number in (1, 2, 3):
        outer, call = ToolCallId(number * 10), ToolCallId(number * 10 + 1)
        events += [started(outer, "make -j"), started(call, "make")]
        events += [ToolCallMerged(2, outer, call), ToolCallEnded(5, call, 0, None)]
        events += [ToolCallEnded(5, call, 0, None), ToolCallEnded(6, outer, 0, None)]
    counts = tallied(*events)
    assert counts.tool_calls == {("make", "hook"): 3} and counts.tool_calls_ended == {"gold": 3}


def test_no_label_carries_an_id(endpoint: Endpoint) -> None:
    text = repr(endpoint.scrape())
    for identifier in ("feedbeef", str(0xFEEDBEEF), "4711", "gold/ada", "engine-81"):
        assert identifier not in text


def test_an_agent_cannot_make_the_endpoint_grow() -> None:
    counts = tallied(
        *(started(n, f"tool{n}") for n in range(1, 500)),
        *(ToolCallEnded(9, ToolCallId(n), 0, None) for n in range(1, 500)),
    )
    kinds = {kind for kind, _ in counts.tool_calls}
    assert len(kinds) == KINDS + 1 and OTHER in kinds
    assert counts.tool_calls.total() == 499


def test_a_scrape_survives_tenants_that_the_policy_does_not_know(endpoint: Endpoint) -> None:
    endpoint.facts = MetricsFacts(Snapshot(now_ns=1, sandboxes=(SANDBOX,)), Counts())
    assert endpoint.scrape()["equipoise_sandbox_memory_bytes", (("tenant", OTHER),)] == 1000


def test_a_taken_port_is_one_clear_line_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match="another program listens there") as caught:
            MetricsServer.start(listen, lambda: MetricsFacts(SNAPSHOT, Counts()))
    assert str(caught.value).startswith(listen) and "\n" not in str(caught.value)


@pytest.mark.parametrize("listen", ["9464", "localhost", "host:port", "127.0.0.1:70000", ""])
def test_an_address_that_is_none_is_one_clear_line(listen: str) -> None:
    with pytest.raises(ListenError, match=r"write it as 127\.0\.0\.1:9464"):
        MetricsServer.start(listen, lambda: MetricsFacts(SNAPSHOT, Counts()))


def test_an_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(ListenError, match="an address of this machine"):
        MetricsServer.start("192.0.2.1:9464", lambda: MetricsFacts(SNAPSHOT, Counts()))


def test_a_closed_endpoint_gives_its_port_back() -> None:
    first = MetricsServer.start("127.0.0.1:0", lambda: MetricsFacts(SNAPSHOT, Counts()))
    first.close()
    again = MetricsServer.start(
        first.url.removeprefix("http://").removesuffix("/metrics"), lambda: MetricsFacts(SNAPSHOT, Counts())
    )
    again.close()
