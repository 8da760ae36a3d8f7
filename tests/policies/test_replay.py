"""Traces replayed in virtual time: what the policy decides when everything happens together."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from equipoise.policies.actions import Grant, Kill, Retain, SetTenantWeight, SwapIn, SwapOut, Throttle, Wait
from equipoise.policies.model import MIB, NS_PER_S, KvTier, Verdict
from equipoise.policies.policy import Budget, Policy
from equipoise.tests.policies.facts import policy
from equipoise.tests.policies.scripts import Round, Script, Tool, growing
from equipoise.tests.policies.simulated_engine import engine
from equipoise.tests.policies.simulation import TICK_NS, Simulation
from hypothesis import given, settings
from hypothesis import strategies as st

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "agent_traces_glm.jsonl.gz"

POLICY = policy(
    pool_mib=1400,
    tenants={"gold": 4.0, "silver": 2.0, "bronze": 1.0},
    budget=Budget(192 * MIB, 256 * MIB),
    max_bytes=512 * MIB,
    step_bytes=96 * MIB,
    wait_ns=8 * NS_PER_S,
)


def small_trace() -> list[Script]:
    """Four agents on one small host; one of them would take it all."""
    return [
        Script(
            "gold",
            "ada",
            (
                Round(1.0, 600, (growing("pytest -q", 6.0, 220),)),
                Round(1.0, 900, (growing("git diff", 0.1, 8),)),
                Round(1.0, 1000, (growing("pytest -q", 6.0, 240),)),
                Round(0.5, 1100),
            ),
        ),
        Script("silver", "bo", (Round(1.5, 700, (growing("cc -O2 a.c", 4.0, 180),)), Round(0.5, 900))),
        Script("silver", "cyd", (Round(0.5, 500, (growing("python load.py", 8.0, 400),)), Round(0.5, 700))),
        Script("bronze", "fox", (Round(0.5, 400, (growing("python runaway.py", 30.0, 4000),)), Round(0.5, 500))),
    ]


@pytest.fixture(scope="module")
def replayed() -> Simulation:
    simulation = Simulation(small_trace(), POLICY, engine(device_tokens=2048))
    simulation.run(at_most_s=120)
    return simulation


def test_only_the_runaway_dies_and_every_agent_finishes(replayed: Simulation) -> None:
    assert replayed.done
    killed = {name: replayed.killed_count(name) for name in ("ada", "bo", "cyd", "fox")}
    assert killed == {"ada": 0, "bo": 0, "cyd": 0, "fox": 1}
    (kill,) = replayed.actions(Kill)
    assert kill.rule == "tool call at the largest budget"
    assert kill.subject == "bronze/fox runaway.py"
    assert isinstance(kill.action, Kill) and "512 MiB" in kill.action.message


def test_a_burst_that_stays_below_the_largest_budget_is_granted_its_way(replayed: Simulation) -> None:
    grants = [d for d in replayed.actions(Grant) if d.subject == "silver/cyd load.py"]
    assert len(grants) == 2  # 256 MiB, then two steps of 96 reach above 400
    (peak,) = [c for c in replayed.state.tool_calls.values() if c.kind == "load.py"]
    assert peak.peak_bytes == 400 * MIB and peak.exit_code == 0


def test_every_stop_is_answered_within_the_wait(replayed: Simulation) -> None:
    assert len(replayed.stops) >= 5
    for stop in replayed.stops:
        assert stop.answered_ns - stop.at_ns <= POLICY.memory.wait_ns + TICK_NS


def test_kv_of_long_calls_leaves_the_crowded_device_and_comes_back_after(replayed: Simulation) -> None:
    swaps = replayed.actions(SwapOut)
    assert swaps and all(isinstance(d.action, SwapOut) and d.action.tier is KvTier.HOST for d in swaps)
    returned = {d.action.session for d in replayed.actions(SwapIn) if isinstance(d.action, SwapIn)}
    assert returned & {d.action.session for d in swaps if isinstance(d.action, SwapOut)}
    verdicts = {c.kind: c.verdict for c in replayed.state.tool_calls.values()}
    assert verdicts["git"] in (None, Verdict.KEEP), "a short call causes no decision"
    assert Verdict.SWAP_HOST in verdicts.values()


def test_each_tool_call_carries_the_kv_its_session_held_meanwhile(replayed: Simulation) -> None:
    for call in replayed.state.tool_calls.values():
        assert call.kv.held_bytes > 0, call.kind
        assert call.kv.idle_byte_seconds > 0, call.kind
        assert call.kv.at_peak_bytes > 0 or call.verdict is Verdict.DROP, call.kind


def test_each_tenants_weight_is_told_once(replayed: Simulation) -> None:
    told = [d.action for d in replayed.actions(SetTenantWeight)]
    assert len(told) == len(set(told)) == 3


def test_the_same_trace_gives_the_same_decisions() -> None:
    runs = []
    for _ in range(2):
        simulation = Simulation(small_trace(), POLICY, engine(device_tokens=2048))
        simulation.run(at_most_s=120)
        runs.append(simulation.log)
    assert runs[0] == runs[1]


def test_on_a_roomy_device_kv_is_only_ever_kept() -> None:
    simulation = Simulation(small_trace(), POLICY, engine(device_tokens=100_000))
    simulation.run(at_most_s=120)
    assert simulation.actions(Retain)
    assert not simulation.actions(SwapOut)
    assert simulation.recomputed_tokens == 0


def test_without_room_for_two_bursts_one_waits_for_the_other() -> None:
    tight = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=650 * MIB))
    burst = Tool("python load.py", 3.0, ((0.0, 10 * MIB), (0.5, 340 * MIB)))
    later = Tool("python load.py", 3.0, ((0.0, 10 * MIB), (0.7, 340 * MIB)))
    simulation = Simulation(
        [Script("gold", "ada", (Round(0.5, 100, (burst,)),)), Script("silver", "bo", (Round(0.5, 100, (later,)),))],
        tight,
        engine(device_tokens=10_000),
    )
    simulation.run(at_most_s=60)
    assert simulation.highest_bytes <= 650 * MIB
    (wait,) = simulation.actions(Wait)
    assert wait.tenant == "silver"
    assert not simulation.actions(Kill), "the wait is longer than the burst"


def test_bursts_that_follow_each_other_closely_do_not_share_one_promise() -> None:
    """Each looks at a pool in which the last one's grant is not used yet."""
    jump = ((0.0, 10 * MIB), (0.3, 256 * MIB), (0.9, 350 * MIB))
    crowd = [
        Script("gold", f"a{number}", (Round(0.2 + 0.1 * number, 10, (Tool("python load.py", 2.0, jump),)),))
        for number in range(4)
    ]
    narrow = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=(4 * 256 + 100) * MIB))
    simulation = Simulation(crowd, narrow, engine(device_tokens=10_000))
    simulation.run(at_most_s=60)
    assert simulation.highest_bytes <= (4 * 256 + 100) * MIB
    assert len(simulation.actions(Grant)) == 4


def test_pressure_that_lasts_slows_the_tenant_furthest_above_its_share() -> None:
    level = ((0.0, 240 * MIB),)
    crowd = [
        Script("gold", "ada", (Round(0.2, 10, (Tool("pytest", 8.0, level),)),)),
        Script("bronze", "eve", (Round(0.2, 10, (Tool("pytest", 8.0, level), Tool("cc", 8.0, level))),)),
    ]
    narrow = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=760 * MIB))
    simulation = Simulation(crowd, narrow, engine(device_tokens=10_000))
    simulation.run(at_most_s=60)
    throttled = [d.tenant for d in simulation.actions(Throttle)]
    assert throttled and throttled[0] == "bronze"
    ada, eve = simulation.finished_ns("ada"), simulation.finished_ns("eve")
    assert ada is not None and eve is not None and ada < eve


# -- nobody starves


@st.composite
def crowds(draw: st.DrawFn) -> list[Script]:
    tools = st.builds(
        growing,
        st.sampled_from(("pytest", "cc a.c", "python load.py")),
        st.floats(0.1, 4.0),
        st.integers(11, 900),
    )
    rounds = st.builds(
        Round,
        st.floats(0.1, 1.0),
        st.integers(1, 1500),
        st.lists(tools, max_size=2).map(tuple),
    )
    scripts = []
    for number in range(draw(st.integers(1, 4))):
        tenant = draw(st.sampled_from(("gold", "silver", "bronze")))
        scripts.append(Script(tenant, f"a{number}", tuple(draw(st.lists(rounds, min_size=1, max_size=2)))))
    return scripts


@st.composite
def memory_policies(draw: st.DrawFn) -> Policy:
    hard = draw(st.integers(16, 512))
    memory = replace(
        POLICY.memory,
        tool_pool_bytes=draw(st.integers(64, 1500)) * MIB,
        budget=Budget(hard * MIB // 2, hard * MIB),
        max_bytes=draw(st.integers(hard, 1024)) * MIB,
        step_bytes=draw(st.integers(16, 512)) * MIB,
        wait_ns=draw(st.integers(0, 4)) * NS_PER_S,
        throttle_ns=NS_PER_S,
    )
    return replace(POLICY, memory=memory)


@settings(max_examples=60, deadline=None)
@given(crowds(), memory_policies(), st.sampled_from((500, 2000, 100_000)))
def test_every_stopped_call_is_granted_or_ended_within_its_wait_and_every_agent_finishes(
    scripts: list[Script], of: Policy, device_tokens: int
) -> None:
    simulation = Simulation(scripts, of, engine(device_tokens))
    simulation.run(at_most_s=400)
    for stop in simulation.stops:
        assert stop.answered_ns - stop.at_ns <= of.memory.wait_ns + TICK_NS
    waits = [(d.action.tool_call, d.action.expires_ns) for d in simulation.actions(Wait) if isinstance(d.action, Wait)]
    assert len(waits) == len(set(waits)), "no stop is told twice to wait"


# -- recorded runs


def recorded(count: int) -> Iterator[dict[str, Any]]:
    with gzip.open(TRACES, "rt") as lines:
        for _, line in zip(range(count), lines, strict=False):
            yield json.loads(line)


def script_of(task: dict[str, Any], tenant: str, name: str, rounds: int) -> Script:
    """The first rounds of a recorded run: its turns, and the tools that started before the next turn."""
    made = []
    turns = task["turns"][: rounds + 1]
    for turn, following in pairwise(turns):
        calls = [c for c in task["tool_calls"] if turn["start_s"] <= c["start_s"] < following["start_s"]]
        tools = tuple(_tool_of(call, task["memory"]) for call in calls)
        made.append(Round(turn["end_s"] - turn["start_s"], turn["prompt_tokens"] + turn["output_tokens"], tools))
    return Script(tenant, name, tuple(made))


def _tool_of(call: dict[str, Any], memory: list[list[float]]) -> Tool:
    """A recorded call; its memory is what the container grew by meanwhile, above what it held before."""
    before = [size for at, size, _ in memory if at <= call["start_s"]]
    base = before[-1] if before else 0.0
    curve = [(at, size) for at, size, _ in memory if call["start_s"] <= at <= call["end_s"]]
    steps = [(0.0, 4 * MIB)]
    steps += [(at - call["start_s"], 4 * MIB + max(0, int(size - base))) for at, size in curve]
    return Tool(call["command"] or call["tool"], max(0.001, call["end_s"] - call["start_s"]), tuple(steps))


@pytest.mark.skipif(not TRACES.exists(), reason=f"the recorded traces are not at {TRACES}")
@pytest.mark.parametrize("device_tokens", [120_000, 2_000_000])
def test_recorded_agents_finish_within_the_law_and_kv_pays_for_a_crowded_device(device_tokens: int) -> None:
    tenants = ("gold", "silver", "bronze")
    scripts = [script_of(task, tenants[number % 3], f"a{number}", rounds=25) for number, task in enumerate(recorded(6))]
    of = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=1024 * MIB, budget=Budget(96 * MIB, 128 * MIB)))
    simulation = Simulation(scripts, of, engine(device_tokens, bytes_per_token=4096, host_bytes=8 << 30))
    simulation.run(at_most_s=2000)
    calls = sum(len(r.tools) for script in scripts for r in script.rounds)
    assert calls > 100
    assert sum(h.total for h in simulation.state.estimates.durations.values()) == calls - len(simulation.actions(Kill))
    for stop in simulation.stops:
        assert stop.answered_ns - stop.at_ns <= of.memory.wait_ns + TICK_NS
    if device_tokens == 120_000:
        assert simulation.actions(SwapOut)
    else:
        assert simulation.actions(Retain) and not simulation.actions(SwapOut)
