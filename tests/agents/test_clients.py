"""Real agents against the scripted model, without our daemon: each runs all it is asked to run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from equipoise.tests.agents.clients import CLIENTS, prepare
from equipoise.tests.agents.drive import drive
from equipoise.tests.agents.install import CannotInstall
from equipoise.tests.agents.model import ScriptedModel
from equipoise.tests.agents.script import TEN

pytestmark = [pytest.mark.agents, pytest.mark.slow]


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel() as scripted:
        yield scripted


@pytest.mark.parametrize("name", CLIENTS)
def test_the_conversation_of_ten_calls_completes(name, model, tmp_path):
    client = CLIENTS[name]
    try:
        client.install()
    except CannotInstall as error:
        pytest.skip(str(error))
    launch, script = prepare(client, model.url, tmp_path), client.fit(TEN)
    model.book.expect(launch.label, script, in_words=client.in_words)
    ended = drive(launch, until=model.all_said)
    assert ended.returncode == 0, ended.output[-2000:]
    conversation = model.conversation(launch.label)
    assert conversation.complete, [call.as_json() for call in conversation.calls]
    results = {call.command.name: call.result for call in conversation.calls}
    assert list(results) == [command.name for command in script.commands]
    assert "one two three" in results["echo"] and "314572800" in results["allocate"]
    assert "it failed" in results["failing"]
    assert "quotes" not in results or "HERE" in results["quotes"]
    assert "README.md" in results["git-status"] and "part 3" in results["slow"]
    assert all(call.peer_pids for call in conversation.calls)
