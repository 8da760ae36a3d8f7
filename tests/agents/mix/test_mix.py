"""A scripted mix of calls under a real daemon: every call once and nothing else, with its conversation and without.

A quarter of it here, some 100 calls; all 400 with EQUIPOISE_FULL=1, and with figures by
`python -m equipoise.tests.agents.mix`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from equipoise.tests.agents.mix.plan import Plan, Step, plans
from equipoise.tests.agents.mix.score import Said, Thing, score, table
from equipoise.tests.agents.mix.trial import POLICY, run
from equipoise.tests.fixtures.running_daemon import RunningDaemon, with_probes

CALLS = 400 if os.environ.get("EQUIPOISE_FULL") else 100
LEAST = 0.99
NS = 1_000_000_000


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("mix"), "--verbose", policy=POLICY) as running:
        yield running


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("heard", [True, False], ids=["its conversations are told", "only its shape is seen"])
def test_of_a_mix_every_call_is_found_once_and_nothing_else_is_one(daemon, tmp_path, heard):
    result = run(daemon, CALLS, tmp_path / "run", heard=heard)
    told = table(result)
    assert result.precision >= LEAST and result.recall >= LEAST, told
    assert len(result.wrong) <= (1 - LEAST) * 2 * result.calls, told
    # Whatever the load: nothing that is the agent, keeps house for it or serves it is taken for a call.
    for (truth, role), count in result.roles.items():
        if truth in ("runtime", "shell", "service", "start-up"):
            assert role == truth, (truth, role, count)
        if truth == "housekeeping" and heard:
            assert role == truth, (role, count)


STEPS = {n: Step(n, "tool call", "shell bash pipe", f"make mix{n}x") for n in (1, 2, 3)}
STEPS[4] = Step(4, "housekeeping", "argv", "git status", None)


def thing(number: int, began: float, pid: int = 0, role: str = "tool call") -> Thing:
    return Thing("ada", role, number, pid, int(began * NS), int((began + 1) * NS), 0)


def said(command: str, start: float, end: float | None = None, pid: int = 5) -> Said:
    return Said("ada", pid, command, int(start * NS), int((end or start + 1) * NS), 0, None, 0, "")


def scored(things: list[Thing], rows: list[Said]):
    return score(STEPS, things, rows, {}, {}, heard=False)


def test_each_way_to_be_wrong_has_its_name_in_the_score():
    right = scored([thing(1, 1), thing(2, 3)], [said("make mix1x", 1), said("make mix2x", 3)])
    assert (right.precision, right.recall, right.wrong) == (1.0, 1.0, [])
    split = scored([thing(1, 1)], [said("make mix1x", 1), said("cc mix1x", 1.5)])
    assert len(split.split) == 1 and split.precision == 0.5 and split.recall == 1.0
    merged = scored([thing(1, 1), thing(2, 3)], [said("make mix1x", 1, 4)])
    assert len(merged.merged) == 1 and merged.recall == 0.5
    missed = scored([thing(1, 1), thing(2, 3)], [said("make mix1x", 1)])
    assert len(missed.missed) == 1
    invented = scored([thing(1, 1), thing(4, 2, 77, "housekeeping")], [said("make mix1x", 1), said("git", 2, pid=77)])
    assert len(invented.invented) == 1 and invented.roles["housekeeping", "tool call"] == 1
    late = scored([thing(1, 1)], [said("make mix1x", 3.5)])
    assert len(late.wrong) == 2 and late.recall == 1.0


def test_a_plan_holds_all_ways_and_about_as_many_calls_as_it_was_asked_for(tmp_path):
    made = plans(400, folder=tmp_path)

    def calls(plan: Plan) -> list[Step]:
        return [step for step in plan.steps if step.role == "tool call"]

    assert 380 <= sum(len(calls(plan)) for plan in made) <= 450
    assert max(len(turn) for plan in made for turn in plan.turns) == 40, "at once"
    assert {"shell bash pipe", "shell dash pipe", "shell bash socket", "shell bash terminal", "npx", "wrapper"} <= {
        step.how for plan in made for step in calls(plan)
    }
    numbers = [step.number for plan in made for step in plan.steps]
    assert len(numbers) == len(set(numbers))
