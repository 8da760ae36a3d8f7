"""Real agents under a real daemon: their tool calls, all of them and nothing else, and the agents live.

What is started here is a part of what can be: every launcher, and the screens of two. aider is left out: typed to
over a terminal, it now and then runs a command twice, which is then two calls in truth. All of it, with the figures:
`python -m equipoise.tests.agents`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from equipoise.tests.agents.clients import CLIENTS
from equipoise.tests.agents.install import CannotInstall
from equipoise.tests.agents.script import SIDE_BY_SIDE, TEN
from equipoise.tests.agents.trial import POLICY, run, run_two
from equipoise.tests.fixtures.running_daemon import RunningDaemon, with_probes

pytestmark = [pytest.mark.agents, pytest.mark.kernel, pytest.mark.slow]
STARTS = [
    *((name, launcher) for name in ("claude", "codex") for launcher in ("plain", "timeout", "env", "sh", "npx")),
    *(("gemini", launcher) for launcher in ("plain", "timeout", "npx")),
    *((name, "plain") for name in ("opencode", "mini", "claude-screen", "codex-screen")),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with with_probes(tmp_path_factory.mktemp("daemon"), policy=POLICY) as running:
        yield running


@pytest.mark.parametrize(("name", "launcher"), STARTS)
def test_every_tool_call_is_found_and_nothing_else(name, launcher, daemon, tmp_path):
    client = CLIENTS[name]
    try:
        client.install()
    except CannotInstall as error:
        pytest.skip(str(error))
    trial = run(daemon, client, tmp_path / "run", launcher, TEN)
    score = trial.score
    assert score.survived, trial.ended.output[-2000:]
    assert not score.missed and score.precision == 1.0, score.confusion()
    assert not score.wrong


@pytest.mark.parametrize("name", ["claude", "codex"])
def test_two_conversations_of_one_agent_at_once_stay_apart(name, daemon, tmp_path):
    client = CLIENTS[name]
    try:
        client.install()
    except CannotInstall as error:
        pytest.skip(str(error))
    two = run_two(daemon, client, tmp_path / "run", SIDE_BY_SIDE)
    assert two.score.perfect, (two.score.confusion(), two.score.wrong, two.ended.output[-2000:])
    assert two.apart, (two.sessions, two.expected)
