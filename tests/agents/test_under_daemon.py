"""Real agents under a real daemon: their tool calls, all of them and nothing else, with their ids, and the agents live.

Every agent makes ten calls plain, and three behind each launcher; EQUIPOISE_FULL=1 has ten everywhere, two more
launchers and all screens. aider is left out: typed to over a terminal, it now and then runs a command twice, which is
then two calls in truth. With the figures: `python -m equipoise.tests.agents`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from equipoise.tests.agents.clients import CLIENTS, LAUNCHERS, SCREENS, Client, launchers_of
from equipoise.tests.agents.install import CannotInstall
from equipoise.tests.agents.script import FEW, SIDE_BY_SIDE, TEN
from equipoise.tests.agents.trial import POLICY, run, run_two
from equipoise.tests.fixtures.running_daemon import RunningDaemon, with_probes

pytestmark = [pytest.mark.agents, pytest.mark.kernel, pytest.mark.slow]
FULL = "EQUIPOISE_FULL" in os.environ
AGENTS = ("claude", "codex", "gemini", "opencode", "mini")
WAYS = list(LAUNCHERS) if FULL else ["plain", "timeout", "env", "sh", "npx"]
SEEN = [client.name for client in SCREENS] if FULL else ["claude-screen", "codex-screen"]
STARTS = [
    *((name, way) for name in AGENTS for way in WAYS if way in launchers_of(CLIENTS[name])),
    *((name, "plain") for name in SEEN),
]
TWICE = [
    *((name, False) for name in ("claude", "codex", "gemini")),
    ("codex", True),
    *((name, heard) for name in ("opencode", "mini") for heard in (False, True) if FULL),
    *((name, True) for name in ("claude", "gemini") if FULL),
]
"""The agent, and whether an engine is heard; two of opencode at once take up to 25 s."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("daemon"), policy=POLICY) as running:
        yield running


def installed(name: str) -> Client:
    client = CLIENTS[name]
    try:
        client.install()
    except CannotInstall as error:
        pytest.skip(str(error))
    return client


@pytest.mark.parametrize(("name", "launcher"), STARTS)
def test_every_tool_call_is_found_and_nothing_else(name, launcher, daemon, tmp_path):
    script = TEN if FULL or launcher == "plain" else FEW
    trial = run(daemon, installed(name), tmp_path / "run", launcher, script)
    score = trial.score
    assert score.survived, trial.ended.output[-2000:]
    assert not score.missed and score.precision == 1.0, score.confusion()
    assert not score.wrong


@pytest.mark.parametrize(("name", "heard"), TWICE)
def test_two_conversations_of_one_agent_at_once_stay_apart_with_the_same_words(name, heard, daemon, tmp_path):
    two = run_two(daemon, installed(name), tmp_path / "run", SIDE_BY_SIDE, heard=heard)
    assert two.score.perfect, (two.score.confusion(), two.score.wrong, two.ended.output[-2000:])
    assert two.apart, (two.sessions, two.expected)
