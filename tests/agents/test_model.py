"""The scripted model itself: what it asks for, and that conversations are kept apart. Needs no agent."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
from equipoise.tests.agents.model import ScriptedModel
from equipoise.tests.agents.script import ECHO, GIT_STATUS, PYTHON, Script

SHORT = Script(((ECHO,), (GIT_STATUS, PYTHON)))
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel(SHORT) as scripted:
        yield scripted


class Agent:
    """An agent of a few lines for one API: keeps its history, asks, and answers each tool call with its own command."""

    def __init__(
        self, model: ScriptedModel, prompt: str, *, stream: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.prompt, self.stream, self.headers = model, prompt, stream, dict(headers or {})
        self.history: list[Any] = []

    path = "/v1/chat/completions"
    tools: ClassVar[Any] = [{"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}]

    def body(self) -> dict[str, Any]:
        messages = [{"role": "system", "content": "be good"}, {"role": "user", "content": self.prompt}]
        return {"model": "m", "messages": [*messages, *self.history], "tools": self.tools, "stream": self.stream}

    def take(self, events: list[Any]) -> list[tuple[str, str]]:
        """Call id and command of what is asked for; what is said becomes history."""
        choice = events[0]["choices"][0]
        message = choice["delta" if self.stream else "message"]
        self.history.append(message)
        return [
            (call["id"], json.loads(call["function"]["arguments"])["command"]) for call in message.get("tool_calls", ())
        ]

    def tell(self, call_id: str, text: str) -> None:
        self.history.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def send(self, body: dict[str, Any], path: str = "") -> list[Any]:
        request = urllib.request.Request(self.model.url + (path or self.path), json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        if not self.stream:
            return [json.loads(text)]
        data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in data if line != "[DONE]"]

    def step(self) -> list[str]:
        """Ask once, run nothing, tell a result for each call; the commands that were asked for."""
        asked = self.take(self.send(self.body()))
        for call_id, command in asked:
            self.tell(call_id, f"ran {command}")
        return [command for _, command in asked]


class MessagesAgent(Agent):
    path = "/v1/messages?beta=true"
    tools: ClassVar[Any] = [{"name": "Bash", "input_schema": SCHEMA}, {"name": "Read", "input_schema": {}}]

    def body(self):
        opening = {"role": "user", "content": [{"type": "text", "text": self.prompt}]}
        return {"model": "m", "messages": [opening, *self.history], "tools": self.tools, "stream": self.stream}

    def take(self, events):
        if not self.stream:
            blocks = events[0]["content"]
        else:
            blocks = [{**e["content_block"]} for e in events if e["type"] == "content_block_start"]
            for event in events:
                if event["type"] == "content_block_delta" and "partial_json" in event["delta"]:
                    blocks[event["index"]]["input"] = json.loads(event["delta"]["partial_json"])
        self.history.append({"role": "assistant", "content": blocks})
        return [(block["id"], block["input"]["command"]) for block in blocks if block["type"] == "tool_use"]

    def tell(self, call_id, text):
        block = {"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": text}]}
        self.history.append({"role": "user", "content": [block]})


class ResponsesAgent(Agent):
    path = "/v1/responses"
    tools: ClassVar[Any] = [
        {"type": "function", "name": "exec_command", "parameters": {"properties": {"cmd": {"type": "string"}}}}
    ]

    def body(self):
        opening = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": self.prompt}]}
        return {"model": "m", "input": [opening, *self.history], "tools": self.tools, "stream": self.stream}

    def take(self, events):
        items = events[-1]["response"]["output"] if self.stream else events[0]["output"]
        self.history += items
        calls = [item for item in items if item["type"] == "function_call"]
        return [(call["call_id"], json.loads(call["arguments"])["cmd"]) for call in calls]

    def tell(self, call_id, text):
        self.history.append({"type": "function_call_output", "call_id": call_id, "output": text})


class GeminiAgent(Agent):
    """Tells no call ids, as old clients do."""

    tools: ClassVar[Any] = [{"functionDeclarations": [{"name": "run_shell_command", "parametersJsonSchema": SCHEMA}]}]

    @property
    def path(self):  # type: ignore[override]
        return f"/v1beta/models/m:{'streamGenerateContent?alt=sse' if self.stream else 'generateContent'}"

    def body(self):
        return {"contents": [{"role": "user", "parts": [{"text": self.prompt}]}, *self.history], "tools": self.tools}

    def take(self, events):
        parts = events[0]["candidates"][0]["content"]["parts"]
        self.history.append({"role": "model", "parts": parts})
        return [("", part["functionCall"]["args"]["command"]) for part in parts if "functionCall" in part]

    def tell(self, call_id, text):
        response = {"functionResponse": {"name": "run_shell_command", "response": {"output": text}}}
        self.history.append({"role": "user", "parts": [response]})


AGENTS = (Agent, MessagesAgent, ResponsesAgent, GeminiAgent)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", AGENTS)
def test_every_api_hears_the_whole_script(model, kind, stream):
    agent = kind(model, "do it", stream=stream)
    said = [agent.step(), agent.step(), agent.step()]
    assert said == [[ECHO.text], [GIT_STATUS.text, PYTHON.text], []]
    [conversation] = model.conversations
    assert conversation.complete and conversation.ended_ns
    assert [call.result for call in conversation.calls] == [f"ran {c.text}" for c in SHORT.commands]
    assert all(call.asked_ns < (call.answered_ns or 0) for call in conversation.calls)


@pytest.mark.parametrize("kind", AGENTS)
def test_a_request_that_is_sent_again_gets_the_same_answer(model, kind):
    agent = kind(model, "do it")
    agent.step()
    body = agent.body()
    first, second = agent.take(agent.send(body)), agent.take(agent.send(body))
    assert first == second and len(model.conversations[0].calls) == 3


@pytest.mark.parametrize("kind", AGENTS)
def test_a_request_without_tools_does_not_advance_the_script(model, kind):
    agent = kind(model, "do it")
    agent.step()
    without = {key: value for key, value in agent.body().items() if key != "tools"}
    agent.send(without)
    agent.send(without)
    assert agent.step() == [GIT_STATUS.text, PYTHON.text]
    assert model.conversations[0].side_requests == 2


@pytest.mark.parametrize("kind", AGENTS)
def test_conversations_at_the_same_time_are_kept_apart(model, kind):
    model.book.expect("second", Script(((PYTHON,),)))
    first, second = kind(model, "the first"), kind(model, "the second")
    assert (first.step(), second.step()) == ([ECHO.text], [PYTHON.text])
    assert (first.step(), second.step()) == ([GIT_STATUS.text, PYTHON.text], [])
    assert model.conversation("second").complete and not model.conversation("first").complete


def test_the_same_words_in_two_sessions_are_two_conversations(model):
    agents = [Agent(model, "do it", headers={"x-session-id": name}) for name in ("one", "two")]
    assert [agent.step() for agent in agents] == [[ECHO.text]] * 2
    assert [conversation.session for conversation in model.conversations] == ["one", "two"]
    assert model.conversations[0].wire == {"x-session-id": {"one"}}


def test_a_call_knows_the_process_that_asked(model):
    Agent(model, "do it").step()
    [call] = model.conversations[0].calls
    assert call.peer_pids[0] == os.getpid() and call.peer_port


def test_tokens_are_counted_and_the_root_is_there(model):
    for path, key in (("/v1/messages/count_tokens", "input_tokens"), ("/v1beta/models/m:countTokens", "totalTokens")):
        assert Agent(model, "").send({"messages": []}, path)[0][key] == 123
    with urllib.request.urlopen(urllib.request.Request(model.url, method="HEAD"), timeout=5) as answer:
        assert answer.status == 200
    assert not model.conversations


def test_an_agent_without_tools_finds_its_commands_in_the_text(model):
    model.book.expect("run 7", Script(((ECHO,), (PYTHON,))), in_words=True)
    agent = Agent(model, "an example of the system's own")
    agent.tools = None  # type: ignore[misc]
    agent.history = [{"role": "assistant", "content": "Ok."}]
    for command in (ECHO, PYTHON):
        agent.history.append({"role": "user", "content": "go on (run 7)"})
        assert agent.step() == [] and agent.history[-1]["content"] == f"```bash\n{command.text}\n```"
        agent.history.append({"role": "user", "content": f"Output from {command.text}\nit ran\n"})
    agent.step()
    conversation = model.conversation("run 7")
    assert agent.history[-1]["content"] == "All done." and conversation.complete
    assert [call.result[-7:] for call in conversation.calls] == ["it ran\n"] * 2
