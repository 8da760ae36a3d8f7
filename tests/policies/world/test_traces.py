"""Scripts, machines and policies from outside: read right, or refused with what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from equipoise.policies.accounting import GammaSource
from equipoise.policies.model import MIB
from equipoise.policies.policy import KvPart
from equipoise.policies.world.machine import EMBEDDED_BYTES_PER_TOKEN, MACHINES, machine_of
from equipoise.policies.world.names import PARTS, WHAT_THEY_ARE, plan
from equipoise.policies.world.script import Script, Tool, Turn
from equipoise.policies.world.traces import (
    LEAST_TURNS,
    RUNTIME_BYTES,
    SKIPPED_TURNS,
    random_scripts,
    room_for,
    sample,
    script_of,
)

RUN: dict[str, Any] = {
    "task": "t/1",
    "duration_s": 20.0,
    "memory": [[0.0, 50 * MIB, 0.1], [4.0, 200 * MIB, 0.5], [5.0, 200 * MIB + 1, 0.5], [9.0, 100 * MIB, 0.1]],
    "turns": [
        {"start_s": 0.0, "end_s": 3.0, "prompt_tokens": 1000, "output_tokens": 50},
        {"start_s": 8.0, "end_s": 10.0, "prompt_tokens": 1200, "output_tokens": 40},
        {"start_s": 11.0, "end_s": 12.0, "prompt_tokens": 1300, "output_tokens": 30},
    ],
    "tool_calls": [
        {"start_s": 3.1, "end_s": 7.9, "tool": "Bash", "command": "pytest"},
        {"start_s": 5.0, "end_s": 6.0, "tool": "Read", "command": None},
    ],
}


def test_what_an_agent_does_between_two_turns_is_one_call_with_the_memory_that_was_recorded() -> None:
    script = script_of(json.dumps(RUN), "ada", "gold")
    first, second, last = script.turns
    assert (script.tenant, script.name, script.runtime_bytes) == ("gold", "ada", RUNTIME_BYTES)
    (tool,) = first.tools
    assert (tool.command, tool.seconds) == ("pytest", 5.0)
    assert tool.memory == ((0.0, 50 * MIB), (1.0, 200 * MIB)), "what hardly moved is no step, what came later no part"
    assert not second.tools and second.pause_s == 1.0
    assert last == Turn(1300, 30)


def test_tokens_and_memory_are_scaled_as_asked() -> None:
    script = script_of(json.dumps(RUN), "ada", scale=0.1, tool_factor=4.0)
    assert script.turns[0].prompt_tokens == 100 and script.turns[0].output_tokens == 5
    assert script.turns[0].tools[0].peak_bytes == 800 * MIB


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "not a recorded run"),
        ("{}", "no field 'memory'"),
        (json.dumps(RUN | {"turns": []}), "no turns"),
        (json.dumps(RUN | {"turns": [{"start_s": 0.0}]}), "no field 'prompt_tokens'"),
        (json.dumps(RUN | {"memory": [[None, 1]]}), "not a recorded run"),
    ],
)
def test_what_is_no_recording_is_refused_in_words(line: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        script_of(line, "ada")


def test_a_tools_memory_is_held_until_the_next_step() -> None:
    tool = Tool("cc", 10.0, ((0.0, 100), (4.0, 300), (20.0, 999)))
    assert [tool.bytes_at(second) for second in (0.0, 3.9, 4.0, 9.0)] == [100, 100, 300, 300]
    assert tool.peak_bytes == 300
    assert tool.byte_seconds == 4 * 100 + 6 * 300
    assert Tool("ls", 1.0).byte_seconds == Tool("ls", 1.0).peak_bytes == 0


def test_the_seed_alone_decides_who_plays() -> None:
    assert random_scripts(5, 4) == random_scripts(5, 4) != random_scripts(6, 4)
    turns = tuple(Turn(100 + n, 1) for n in range(40))
    recorded = [Script("default", f"a{n}", turns[: n + 5]) for n in range(30)]
    drawn = sample(recorded, 6, seed=1)
    assert drawn == sample(recorded, 6, seed=1) != sample(recorded, 6, seed=2)
    assert len(drawn) == 6
    for script in drawn:
        original = next(each for each in recorded if each.name == script.name)
        assert len(original.turns) > LEAST_TURNS
        assert script.turns[0] == original.turns[SKIPPED_TURNS]


def test_a_machine_short_of_both_holds_its_longest_turn_all_the_same() -> None:
    scripts = [Script("default", "ada", (Turn(10_000, 100, (Tool("cc", 1.0, ((0.0, 8 * MIB),)),)),))]
    room = room_for(scripts, MACHINES["cpu"], 0.01, 0.5, 7)
    assert room.device_tokens == int(1.2 * 10_100) and room.disk_bytes == 7
    assert room.ram_bytes == int(0.5 * (0.5 * 10_100 * MACHINES["cpu"].bytes_per_token + 8 * MIB))


def test_what_an_engine_keeps_of_its_fit_is_a_machine() -> None:
    fit = {
        "prefill_seconds_per_token": 6e-3,
        "prefill_seconds_per_token2": 0.0,
        "decode_step_seconds": 0.02,
        "decode_seconds_per_sequence": 0.005,
        "host_bytes_per_second": 4e9,
        "disk_bytes_per_second": 0.0,
        "decode_seconds_per_context_token": 1.2e-5,
    }
    made = machine_of("this", fit)
    assert made.bytes_per_token == EMBEDDED_BYTES_PER_TOKEN
    assert made.decode_step_s(3) == pytest.approx(0.03)
    assert made.gamma is not None and made.gamma.source is GammaSource.MEASURED
    for key in ("prefill_seconds_per_token", "host_bytes_per_second"):
        with pytest.raises(ValueError, match=f"{key} must be above 0"):
            machine_of("this", fit | {key: 0.0})
    with pytest.raises(ValueError, match="decode_step_seconds"):
        machine_of("this", fit | {"decode_step_seconds": "fast"})
    with pytest.raises(ValueError, match="no mapping"):
        machine_of("this", [1])


def test_each_part_changes_the_rule_it_is_given_to_and_taking_it_away_gives_the_rule_back() -> None:
    bare = plan("worth")
    for part in PARTS:
        if part in ("split", "worth"):
            continue
        given = plan(f"worth+{part}")
        assert replace(given.rule, name="worth") != bare.rule, part
        taken = plan(f"worth+{part}-{part}")
        assert replace(taken.rule, name="worth") == bare.rule or part == "behind", part
    assert plan("economy-worth").rule.worth is plan("swap").rule.worth
    assert plan("minwaste+near=60+door=1.3").rule.near_s == 60.0


def test_parts_of_decide_are_the_policys_and_not_the_engines() -> None:
    assert plan("decide").door is None and plan("decide").without == frozenset()
    shut = plan("decide+door=0.8-marginal-need")
    assert (shut.door, shut.without) == (0.8, frozenset({KvPart.MARGINAL, KvPart.NEED}))
    assert shut.rule.door is None
    for part in KvPart:
        assert plan(f"decide-{part.value}").without == {part}
    with pytest.raises(ValueError, match="no part -marginal"):
        plan("economy-marginal")


def test_every_policy_of_the_list_can_be_made() -> None:
    assert [plan(name).name for name in WHAT_THEY_ARE] == list(WHAT_THEY_ARE)


@pytest.mark.parametrize(
    "name", ["", "best", "drop+nonsense", "drop-split", "worth+near=0", "worth+near=x", "drop near"]
)
def test_an_unknown_policy_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"near|one of"):
        plan(name)
