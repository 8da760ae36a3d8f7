"""Traces replayed in virtual time: what the policy decides when everything happens together."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from equipoise.policies.actions import Grant, Kill, Retain, SetTenantWeight, SwapIn, SwapOut, Throttle, Wait
from equipoise.policies.model import MIB, NS_PER_S, KvTier, Verdict
from equipoise.policies.policy import Budget, LadderRule, Policy
from equipoise.policies.world.script import Script, Tool, growing
from equipoise.policies.world.traces import script_of
from equipoise.tests.policies.facts import policy
from equipoise.tests.policies.simulation import Simulation, taking
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
    bends=False,
)


def small_trace() -> list[Script]:
    """Four agents on one small host; one of them would take it all."""
    return [
        Script(
            "gold",
            "ada",
            (
                taking(1.0, 600, growing("pytest -q", 6.0, 220)),
                taking(1.0, 900, growing("git diff", 0.1, 8)),
                taking(1.0, 1000, growing("pytest -q", 6.0, 240)),
                taking(0.5, 1100),
            ),
        ),
        Script("silver", "bo", (taking(1.5, 700, growing("cc -O2 a.c", 4.0, 180)), taking(0.5, 900))),
        Script("silver", "cyd", (taking(0.5, 500, growing("python load.py", 8.0, 400)), taking(0.5, 700))),
        Script("bronze", "fox", (taking(0.5, 400, growing("python runaway.py", 30.0, 4000)), taking(0.5, 500))),
    ]


@pytest.fixture(scope="module")
def replayed() -> Simulation:
    simulation = Simulation(small_trace(), POLICY, device_tokens=1700)
    simulation.play(at_most_s=120)
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
    (peak,) = [c for c in replayed.lawful.state.tool_calls.values() if c.kind == "load.py"]
    assert peak.peak_bytes == 400 * MIB and peak.exit_code == 0


def test_every_stop_is_answered_within_the_wait(replayed: Simulation) -> None:
    assert len(replayed.tools.stops) >= 5
    replayed.check_stops(POLICY)


def test_kv_of_long_calls_leaves_the_crowded_device_and_comes_back_after(replayed: Simulation) -> None:
    swaps = replayed.actions(SwapOut)
    assert swaps and all(isinstance(d.action, SwapOut) and d.action.tier is KvTier.HOST for d in swaps)
    returned = {d.action.session for d in replayed.actions(SwapIn) if isinstance(d.action, SwapIn)}
    assert returned & {d.action.session for d in swaps if isinstance(d.action, SwapOut)}
    verdicts = {c.kind: c.verdict for c in replayed.lawful.state.tool_calls.values()}
    assert verdicts["git"] in (None, Verdict.KEEP), "a short call causes no decision"
    assert Verdict.SWAP_HOST in verdicts.values()


def test_each_tool_call_carries_the_kv_its_session_held_meanwhile(replayed: Simulation) -> None:
    for call in replayed.lawful.state.tool_calls.values():
        assert call.kv.held_bytes > 0, call.kind
        # Swapped by the engine at once, where another turn waited for the room, it pays on the host alone.
        assert call.kv.idle_byte_seconds + call.kv.host_byte_seconds > 0, call.kind
        assert call.kv.at_peak_bytes > 0 or call.verdict is Verdict.DROP, call.kind


def test_each_tenants_weight_is_told_once(replayed: Simulation) -> None:
    told = [d.action for d in replayed.actions(SetTenantWeight)]
    assert len(told) == len(set(told)) == 3


def test_the_same_trace_gives_the_same_decisions() -> None:
    runs = []
    for _ in range(2):
        simulation = Simulation(small_trace(), POLICY, device_tokens=1700)
        simulation.play(at_most_s=120)
        runs.append(simulation.lawful.log)
    assert runs[0] == runs[1]


def test_on_a_roomy_device_kv_is_only_ever_kept() -> None:
    simulation = Simulation(small_trace(), POLICY, device_tokens=100_000)
    simulation.play(at_most_s=120)
    assert simulation.actions(Retain)
    assert not simulation.actions(SwapOut)
    assert simulation.tally.recomputed_tokens == 0


def test_without_room_for_two_bursts_one_waits_for_the_other() -> None:
    tight = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=650 * MIB))
    burst = Tool("python load.py", 3.0, ((0.0, 10 * MIB), (0.5, 340 * MIB)))
    later = Tool("python load.py", 3.0, ((0.0, 10 * MIB), (0.7, 340 * MIB)))
    simulation = Simulation(
        [Script("gold", "ada", (taking(0.5, 100, burst),)), Script("silver", "bo", (taking(0.5, 100, later),))],
        tight,
        device_tokens=10_000,
    )
    simulation.play(at_most_s=60)
    assert simulation.tally.most_tool_bytes <= 650 * MIB
    (wait,) = simulation.actions(Wait)
    assert wait.tenant == "silver"
    assert not simulation.actions(Kill), "the wait is longer than the burst"


def test_bursts_that_follow_each_other_closely_do_not_share_one_promise() -> None:
    """Each looks at a pool in which the last one's grant is not used yet."""
    jump = ((0.0, 10 * MIB), (0.3, 256 * MIB), (0.9, 350 * MIB))
    crowd = [
        Script("gold", f"a{number}", (taking(0.2 + 0.1 * number, 10, Tool("python load.py", 2.0, jump)),))
        for number in range(4)
    ]
    narrow = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=(4 * 256 + 100) * MIB))
    simulation = Simulation(crowd, narrow, device_tokens=10_000)
    simulation.play(at_most_s=60)
    assert simulation.tally.most_tool_bytes <= (4 * 256 + 100) * MIB
    assert len(simulation.actions(Grant)) == 4


def test_pressure_that_lasts_slows_the_tenant_furthest_above_its_share() -> None:
    level = ((0.0, 240 * MIB),)
    crowd = [
        Script("gold", "ada", (taking(0.2, 10, Tool("pytest", 8.0, level)),)),
        Script("bronze", "eve", (taking(0.2, 10, Tool("pytest", 8.0, level), Tool("cc", 8.0, level)),)),
    ]
    narrow = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=760 * MIB))
    simulation = Simulation(crowd, narrow, device_tokens=10_000)
    simulation.play(at_most_s=60)
    throttled = [d.tenant for d in simulation.actions(Throttle)]
    assert throttled and throttled[0] == "bronze"
    ada, eve = simulation.finished_s("ada"), simulation.finished_s("eve")
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
        lambda seconds, context, asked: taking(seconds, context, *asked),
        st.floats(0.1, 1.0),
        st.integers(1, 1500),
        st.lists(tools, max_size=2),
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
        bends=draw(st.booleans()),
        step_bytes=draw(st.integers(16, 512)) * MIB,
        wait_ns=draw(st.integers(0, 4)) * NS_PER_S,
        ladder=(LadderRule(lasting_ns=NS_PER_S),),
    )
    return replace(POLICY, memory=memory)


@settings(max_examples=60, deadline=None)
@given(crowds(), memory_policies(), st.sampled_from((1600, 2500, 100_000)))
def test_every_stopped_call_is_granted_or_ended_within_its_wait_and_every_agent_finishes(
    scripts: list[Script], of: Policy, device_tokens: int
) -> None:
    simulation = Simulation(scripts, of, device_tokens)
    simulation.play(at_most_s=400)
    simulation.check_stops(of)
    waits = [(d.action.tool_call, d.action.expires_ns) for d in simulation.actions(Wait) if isinstance(d.action, Wait)]
    assert len(waits) == len(set(waits)), "no stop is told twice to wait"


# -- recorded runs


def recorded(count: int, turns: int) -> list[Script]:
    """The first turns of the first recorded runs, each in a tenant of its own in turn."""
    with gzip.open(TRACES, "rt") as file:
        lines = [line for _, line in zip(range(count), file, strict=False)]
    tenants = ("gold", "silver", "bronze")
    scripts = [script_of(line, f"a{number}", tenants[number % 3], scale=1 / 8) for number, line in enumerate(lines)]
    return [replace(script, turns=script.turns[:turns]) for script in scripts]


def quick(script: Script) -> Script:
    """Answers of a few tokens: at 0.1 s a token the tools, not the model, are to take the time."""
    return replace(script, turns=tuple(replace(t, output_tokens=max(1, t.output_tokens // 8)) for t in script.turns))


@pytest.mark.skipif(not TRACES.exists(), reason=f"the recorded traces are not at {TRACES}")
@pytest.mark.parametrize("device_tokens", [15_000, 250_000])
def test_recorded_agents_finish_within_the_law_and_kv_pays_for_a_crowded_device(device_tokens: int) -> None:
    scripts = [quick(script) for script in recorded(6, turns=25)]
    of = replace(POLICY, memory=replace(POLICY.memory, tool_pool_bytes=1024 * MIB, budget=Budget(96 * MIB, 128 * MIB)))
    simulation = Simulation(scripts, of, device_tokens, bytes_per_token=4096, host_bytes=8 << 30, tick_s=0.5)
    simulation.play(at_most_s=4000)
    calls = sum(len(turn.tools) for script in scripts for turn in script.turns)
    assert calls > 100
    learned = simulation.lawful.state.estimates.durations.values()
    assert round(sum(h.total for h in learned)) == calls - len(simulation.actions(Kill))
    simulation.check_stops(of)
    if device_tokens == 15_000:
        assert simulation.actions(SwapOut)
    else:
        assert simulation.actions(Retain) and not simulation.actions(SwapOut)
