"""Plain OpenAI clients, which send no session header, against the engine as a process; and the header of a pace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(model) -> Iterator[EngineProcess]:
    # Split: what a conversation computes does not depend on its neighbours, so texts can be compared.
    with running("--kv-tokens", "2048", "--slots", "4", "--ctx-mode", "split", "--slot-tokens", "512") as process:
        yield process


class Conversation:
    """A client that knows nothing but the messages so far."""

    def __init__(self, engine: EngineProcess, opening: str, **headers: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{engine.url}/v1", api_key="none", max_retries=0, default_headers=headers
        )
        self._messages: list[Any] = [{"role": "system", "content": opening}]
        self.sessions: list[str] = []
        self.usages: list[Any] = []
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer = self._client.chat.completions.create(
            model="default", messages=self._messages, temperature=0, max_tokens=12
        )
        message = answer.choices[0].message
        self._messages.append({"role": "assistant", "content": message.content})
        assert answer.model_extra is not None
        self.sessions.append(answer.model_extra["equipoise"]["session"])
        self.usages.append(answer.usage)
        self.texts.append(message.content or "")

    def cached(self, turn: int) -> int:
        return int(self.usages[turn].prompt_tokens_details.cached_tokens)


def test_the_second_turn_of_a_plain_client_is_served_from_what_the_first_left(engine):
    chat = Conversation(engine, "You name things.")
    chat.say("Name three colours.")
    chat.say("And three animals?")
    assert chat.sessions[0] == chat.sessions[1]
    assert chat.cached(0) == 0
    assert chat.cached(1) == chat.usages[0].total_tokens - 1, "all but the last token sampled"


def test_a_stream_tells_the_session_it_continues(engine):
    chat = Conversation(engine, "You name things, in a stream.")
    chat.say("Name three colours.")
    body = {"messages": [*chat._messages, {"role": "user", "content": "More"}], "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{engine.url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if '"equipoise"' in line]
    assert len(lines) == 1
    assert f'"session":"{chat.sessions[0]}"' in lines[0]


def test_two_tenants_with_the_same_conversation_share_nothing(engine):
    red = Conversation(engine, "You are fair.", **{"X-Equipoise-Tenant": "red"})
    blue = Conversation(engine, "You are fair.", **{"X-Equipoise-Tenant": "blue"})
    red.say("Name three colours.")
    blue.say("Name three colours.")
    assert blue.cached(0) == 0
    assert red.texts == blue.texts
    red.say("And three animals?")
    blue.say("And three animals?")
    assert set(red.sessions).isdisjoint(blue.sessions)
    assert blue.cached(1) == blue.usages[0].total_tokens - 1, "its own"


def test_interleaved_identical_conversations_do_not_corrupt_each_other(engine):
    lines = ["Name three colours.", "And three animals?", "Which of them can fly?"]
    alone = Conversation(engine, "You answer briefly.", **{"X-Equipoise-Session": "alone"})
    for line in lines:
        alone.say(line)
    first, second = (Conversation(engine, "You answer briefly.") for _ in range(2))
    for line in lines:
        first.say(line)
        second.say(line)
    assert first.texts == second.texts == alone.texts
    # Each goes on where some conversation of the same words ended; none is computed twice.
    for turn in (1, 2):
        assert first.cached(turn) == second.cached(turn) == alone.cached(turn) > 0
    assert len({*first.sessions, *second.sessions}) == 2


def test_identical_conversations_at_the_same_time_get_a_session_each(engine):
    chats = [Conversation(engine, "You are one of two.") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for line in ("Name three colours.", "And three animals?"):
            list(pool.map(lambda chat: chat.say(line), chats))  # noqa: B023 -- the map ends within the turn of the loop
    assert chats[0].sessions[1] != chats[1].sessions[1]
    assert all(chat.cached(1) > 0 for chat in chats)


def test_a_conversation_that_departs_leaves_the_other_one_whole(engine):
    first = Conversation(engine, "You like to branch.")
    first.say("Name three colours.")
    branch = Conversation(engine, "You like to branch.")
    branch.say("Name three rivers.")
    first.say("And three animals?")
    assert branch.sessions[0] != first.sessions[0]
    assert first.cached(1) == first.usages[0].total_tokens - 1


def test_with_anonymous_drop_a_turn_without_a_name_leaves_nothing(model):
    with running("--kv-tokens", "512", "--slots", "2", "--anonymous", "drop") as engine:
        chat = Conversation(engine, "You name things.")
        chat.say("Name three colours.")
        chat.say("And three animals?")
        assert chat.cached(1) == 0
        assert chat.sessions[0] != chat.sessions[1]


@pytest.mark.parametrize("value", ["fast", "0", "-5", "1.5", "86400001"])
def test_a_pace_that_is_no_time_is_an_error_that_names_the_header(engine, value):
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = httpx.post(f"{engine.url}/v1/chat/completions", json=ask, headers={"X-Equipoise-TPOT-Ms": value})
    assert answer.status_code == 400
    assert "x-equipoise-tpot-ms" in answer.json()["error"]["message"]


def test_a_pace_is_taken(engine):
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = httpx.post(
        f"{engine.url}/v1/chat/completions", json=ask, headers={"X-Equipoise-TPOT-Ms": "200"}, timeout=60
    )
    assert answer.status_code == 200
