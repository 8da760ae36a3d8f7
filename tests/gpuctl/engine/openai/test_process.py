"""The engine as a process, asked by the official client and by clients that do everything wrong."""

from __future__ import annotations

import asyncio
import collections
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from equipoise.tests.gpuctl.engine.processes import EngineProcess, running

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(model) -> Iterator[EngineProcess]:
    with running("--kv-tokens", "2048", "--slots", "8", "--max-queued", "4", "--max-running", "4") as process:
        yield process


@pytest.fixture
def client(engine: EngineProcess) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{engine.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"X-Equipoise-Session": f"s-{time.monotonic_ns()}", "X-Equipoise-Tenant": "blue"},
    )


ASK = [{"role": "user", "content": "Name three colours."}]


def test_the_official_client_lists_the_model_and_gets_an_answer(client):
    (served,) = client.models.list().data
    assert client.models.retrieve(served.id).id == served.id
    answer = client.chat.completions.create(model=served.id, messages=ASK, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_says_the_same_as_the_whole_answer_and_ends_with_usage(client):
    whole = client.chat.completions.create(model="default", messages=ASK, temperature=0, max_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=ASK,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_the_second_turn_of_a_conversation_is_served_from_the_cache(client):
    first = client.chat.completions.create(model="default", messages=ASK, temperature=0, max_tokens=12)
    messages = [
        *ASK,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And three animals?"},
    ]
    second = client.chat.completions.create(model="default", messages=messages, temperature=0, max_tokens=12)
    held = first.usage.total_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == held


def test_the_same_seed_gives_the_same_text_and_another_one_another(client):
    def text(seed: int) -> str:
        answer = client.completions.create(
            model="default", prompt="Once upon a time", temperature=1.2, seed=seed, max_tokens=16
        )
        return str(answer.choices[0].text)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_logprobs_are_given_per_token_and_ordered(client):
    answer = client.chat.completions.create(
        model="default", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 4
    for token in tokens:
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert token.logprob == pytest.approx(tops[0])  # greedy takes the likeliest
        assert token.logprob <= 0


def test_a_stop_string_is_not_part_of_the_answer(client):
    whole = client.completions.create(model="default", prompt="1, 2, 3, 4,", temperature=0, max_tokens=16)
    text = whole.choices[0].text
    stop = text[6:9]
    cut = client.completions.create(model="default", prompt="1, 2, 3, 4,", temperature=0, max_tokens=16, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_json_schema_is_served_as_the_official_client_asks_for_it(client):
    class Weather(pydantic.BaseModel):
        wet: bool
        sky: Literal["grey", "blue"]

    answer = client.chat.completions.parse(
        model="default",
        messages=[{"role": "user", "content": "How is the weather?"}],
        max_tokens=30,
        response_format=Weather,
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


RUN = {
    "type": "function",
    "function": {
        "name": "run",
        "parameters": {"type": "object", "properties": {"command": {"enum": ["ls", "make"]}}, "required": ["command"],
                       "additionalProperties": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "run"}}])
def test_a_required_tool_is_called_whole_and_streamed(client, choice):
    ask = {"model": "default", "messages": ASK, "max_tokens": 60, "tools": [RUN], "tool_choice": choice}
    whole = client.chat.completions.create(**ask).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    (streamed,) = [chunk.delta.tool_calls[0] for chunk in chunks if chunk.delta.tool_calls]
    assert chunks[-1].finish_reason == "tool_calls"
    for found in (call, streamed):
        assert found.id
        assert found.function.name == "run"
        assert json.loads(found.function.arguments)["command"] in ("ls", "make")


def test_a_conversation_goes_on_with_a_tools_answer(client):
    ask = {"model": "default", "max_tokens": 60, "tools": [RUN]}
    first = client.chat.completions.create(messages=ASK, tool_choice="required", **ask).choices[0].message
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "a.py b.py"}
    second = client.chat.completions.create(messages=[*ASK, first.model_dump(exclude_none=True), answer], **ask)
    assert second.usage.completion_tokens > 0


def test_of_several_calls_only_the_first_is_given_where_one_is_wanted(client):
    call = '"<tool_call>{\\"name\\": \\"run\\", \\"arguments\\": {}}</tool_call>"'
    two = {"grammar": f"%llguidance {{}}\nstart: {call} {call}"}
    for parallel, count in ((True, 2), (False, 1)):
        ask = {"model": "default", "messages": ASK, "max_tokens": 80, "tools": [RUN], "parallel_tool_calls": parallel}
        whole = client.chat.completions.create(**ask, extra_body=two)
        assert len(whole.choices[0].message.tool_calls) == count
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, extra_body=two, stream=True)]
        indexes = [call.index for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert indexes == list(range(count))


def test_text_streams_as_it_comes_although_tools_are_offered(client):
    ask = {"model": "default", "messages": ASK, "max_tokens": 24, "temperature": 0, "tools": [RUN]}
    plain = client.chat.completions.create(**ask).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].delta.content
    ]
    assert "".join(pieces) == plain
    assert len(pieces) > 5


def test_penalties_keep_the_model_from_repeating_itself(client):
    ask = {"model": "default", "prompt": "1 1 1 1 1 1 1 1 1 1 1 1", "temperature": 0, "max_tokens": 16}
    plain = client.completions.create(**ask).choices[0].text
    varied = client.completions.create(**ask, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert plain.split() == ["1"] * 8
    assert varied.split().count("1") < 4


def test_completions_give_logprobs_with_the_place_of_each_token_in_the_text(client):
    ask = {"model": "default", "prompt": "1, 2, 3,", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    whole = client.completions.create(**ask).choices[0]
    details = whole.logprobs
    for token, at in zip(details.tokens, details.text_offset, strict=True):
        assert whole.text[at:].startswith(token)
    streamed = [c.choices[0].logprobs for c in client.completions.create(**ask, stream=True)]
    assert [at for part in streamed if part for at in part.text_offset] == details.text_offset


def test_the_metrics_page_counts_in_base_units(engine, client):
    client.chat.completions.create(model="default", messages=ASK, max_tokens=2)
    page = httpx.get(f"{engine.url}/metrics").text
    assert "equipoise_engine_decode_tokens_total" in page
    assert 'equipoise_engine_service_units_total{tenant="blue"}' in page
    assert "session=" not in page, "sessions are without bound: no labels"


def test_a_grammar_holds_the_model_to_it(client):
    answer = client.completions.create(
        model="default",
        prompt="Is water wet? Answer:",
        temperature=0,
        max_tokens=8,
        extra_body={"grammar": '%llguidance {}\nstart: "yes" | "no"'},
    )
    assert answer.choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "nope"}, 404, "nope"),
        ({"temperature": 7}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "a b c d " * 2000}]}, 400, "2048"),
        ({"n": 2}, 400, "n:"),
        ({"stop": [1]}, 400, "stop"),
        ({"grammar": "root ::= ("}, 400, "grammar"),
        ({"grammar": "%llguidance {}\nstart: ("}, 400, "grammar"),
        ({"logit_bias": [1]}, 400, "logit_bias"),
        ({"logit_bias": {"5": 1e9}}, 400, "logit_bias"),
        ({"stream": "yes"}, 400, "stream"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"functions": []}, 400, "tools"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0]"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"modalities": ["audio"]}, 400, "modalities"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, 400, "tool_calls"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, 400, "not"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it(engine, change, status, word):
    answer = httpx.post(f"{engine.url}/v1/chat/completions", json={"messages": ASK, "max_tokens": 1, **change})
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "word"), [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")]
)
def test_what_completions_cannot_do_is_said(engine, change, word):
    answer = httpx.post(f"{engine.url}/v1/completions", json={"prompt": "x", "max_tokens": 1, **change})
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "not JSON"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (b"[1]", "object"),
        (b"[" * 100_000, "JSON"),
        (b'{"prompt": "\\ud83d"}', "surrogate"),
    ],
)
def test_a_body_that_is_no_json_is_refused_in_words(engine, body, word):
    answer = httpx.post(f"{engine.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_a_body_past_the_limit_is_refused(engine):
    answer = httpx.post(f"{engine.url}/v1/chat/completions", content=b" " * (9 << 20))
    assert answer.status_code == 413


def test_an_unknown_route_answers_in_the_openai_format(engine):
    answer = httpx.get(f"{engine.url}/v1/nothing")
    assert answer.status_code == 404
    assert "/v1/nothing" in answer.json()["error"]["message"]


def decoded_tokens(engine: EngineProcess) -> float:
    page = httpx.get(f"{engine.url}/metrics", timeout=60).text
    return float(
        next(line for line in page.splitlines() if line.startswith("equipoise_engine_decode_tokens")).split()[1]
    )


def test_a_client_that_goes_away_frees_its_place(engine):
    begun = decoded_tokens(engine)
    body = {"messages": ASK, "max_tokens": 1500, "stream": True, "ignore_eos": True, "temperature": 0}
    for _ in range(2):
        with httpx.stream("POST", f"{engine.url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    # A request that does not stream and whose client gives up waiting.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{engine.url}/v1/chat/completions", json={**body, "stream": False}, timeout=0.5)
    quick = httpx.post(f"{engine.url}/v1/chat/completions", json={**body, "stream": False, "max_tokens": 4}, timeout=60)
    assert quick.status_code == 200
    assert decoded_tokens(engine) - begun < 1500, "three abandoned turns of 1500 tokens would have gone on"


def test_more_turns_than_the_queue_takes_are_told_when_to_come_back(engine):
    body = {"messages": ASK, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{engine.url}/v1/chat/completions", json=body, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [a for a in answers if a.status_code == 429]
    assert refused
    assert all(int(a.headers["retry-after"]) > 0 for a in refused)
    assert all(a.status_code in (200, 429) for a in answers)
    assert len([a for a in answers if a.status_code == 200]) >= 4


def test_clients_that_stall_do_not_keep_the_others_waiting(engine, client):
    host, _, port = engine.url.removeprefix("http://").partition(":")
    stalled = [socket.create_connection((host, int(port))) for _ in range(50)]
    try:
        for connection in stalled:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        # One more asks for a long stream and never reads it.
        body = json.dumps({"messages": ASK, "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        stalled.append(socket.create_connection((host, int(port))))
        stalled[-1].sendall(head + body)
        answer = client.chat.completions.create(model="default", messages=ASK, max_tokens=4)
        assert answer.usage.completion_tokens == 4
    finally:
        for connection in stalled:
            connection.close()


async def test_five_hundred_connections_at_once_are_all_answered(engine):
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
    async with httpx.AsyncClient(base_url=engine.url, limits=limits, timeout=120) as many:
        body = {"messages": ASK, "max_tokens": 2}
        answers = await asyncio.gather(
            *(many.post("/v1/chat/completions", json=body) if n % 10 else many.get("/healthz") for n in range(500))
        )
    statuses = collections.Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 50
    assert statuses[429] > 0
