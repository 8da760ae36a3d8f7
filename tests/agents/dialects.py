"""The four APIs that agents speak with a model: what a request says, and how an answer is written.

Owns the wire forms: OpenAI chat completions and responses, Anthropic messages, Gemini generateContent. Knows neither
scripts nor sockets. Where a form is lenient the shortest one that the clients of tests/agents take is written.
Long for holding four of them side by side, which is how they are compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]

SHELL_NAMES = (
    "Bash",
    "bash",
    "shell",
    "shell_command",
    "exec_command",
    "local_shell",
    "run_shell_command",
    "execute_bash",
    "execute_command",
)
"""What the tool that runs a shell command is called, by preference where there are several."""

USAGE = {"input": 10, "output": 5}


@dataclass(frozen=True, slots=True)
class ShellTool:
    """The tool by which a client runs a shell command."""

    name: str
    schema: Json
    """JSON schema of its arguments; {}: not told."""

    def arguments(self, command: str) -> Json:
        """The command and whatever else is required, in this tool's form."""
        properties: Json = self.schema.get("properties", {})
        if "cmd" in properties:
            arguments: Json = {"cmd": command}
        elif properties.get("command", {}).get("type") == "array":
            arguments = {"command": ["bash", "-lc", command]}
        else:
            arguments = {"command": command}
        if "yield_time_ms" in properties:
            arguments["yield_time_ms"] = 30_000  # else a command that takes long is polled for
        for name in self.schema.get("required", ()):
            arguments.setdefault(name, "Run a command")
        return arguments


@dataclass(frozen=True, slots=True)
class Asking:
    """One tool call that an answer asks for."""

    call_id: str
    command: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Tool calls, or words where there are none."""

    text: str
    asks: tuple[Asking, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a tool call, as the client reports it."""

    call_id: str
    """As the client gives it; "" where its API has none."""
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """What a request says, whatever its API."""

    model: str
    opening: str
    """The first words of the user: the same in every request of a conversation."""
    shell: ShellTool | None
    """None: a request on the side (a title, a summary)."""
    results: tuple[Result, ...]
    """Of the whole history, oldest first."""
    stream: bool
    said: tuple[str, ...] = ()
    """Every message of the user, where the API is one of those that agents without tools speak."""


class Dialect(Protocol):
    """One API."""

    name: str

    def read(self, body: Json, path: str) -> Request: ...

    def whole(self, request: Request, answer: Answer) -> Json:
        """The answer as one body."""
        ...

    def events(self, request: Request, answer: Answer) -> Iterator[tuple[str | None, Json | str]]:
        """The same as server-sent events: name and data."""
        ...


def _shell_among(tools: Mapping[str, Json]) -> ShellTool | None:
    for name in SHELL_NAMES:
        if name in tools:
            return ShellTool(name, tools[name])
    return None


def _words(content: object) -> str:
    """Text of a message, whichever form its content has."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_words(part) for part in content)
    if isinstance(content, dict):
        return _words(content.get("text") or content.get("content") or content.get("output") or "")
    return ""


def _opening(messages: list[Json], content: str = "content") -> str:
    """The user's words up to the first answer: some clients put their surroundings into a message of their own."""
    said = []
    for message in messages:
        if message.get("role") in {"assistant", "model"} or "role" not in message:
            break
        if message["role"] == "user":
            said.append(_words(message[content]))
    return "\n".join(said)


class ChatCompletions:
    name = "chat"

    def read(self, body: Json, path: str) -> Request:
        functions = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
        return Request(
            model=body.get("model", ""),
            opening=_opening(body["messages"]),
            shell=_shell_among({f["name"]: f.get("parameters") or {} for f in functions}),
            results=tuple(
                Result(message.get("tool_call_id", ""), _words(message.get("content")))
                for message in body["messages"]
                if message.get("role") == "tool"
            ),
            stream=bool(body.get("stream")),
            said=tuple(_words(message.get("content")) for message in body["messages"] if message["role"] == "user"),
        )

    def whole(self, request: Request, answer: Answer) -> Json:
        return {
            **self._head(request, "chat.completion"),
            "choices": [{"index": 0, "message": self._message(request, answer), "finish_reason": self._why(answer)}],
            "usage": self._usage(),
        }

    def events(self, request: Request, answer: Answer) -> Iterator[tuple[str | None, Json | str]]:
        head = self._head(request, "chat.completion.chunk")
        delta = self._message(request, answer)
        yield None, {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield None, {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": self._why(answer)}]}
        yield None, {**head, "choices": [], "usage": self._usage()}
        yield None, "[DONE]"

    def _head(self, request: Request, kind: str) -> Json:
        return {"id": f"chat-{time.time_ns()}", "object": kind, "created": int(time.time()), "model": request.model}

    def _message(self, request: Request, answer: Answer) -> Json:
        if not answer.asks:
            return {"role": "assistant", "content": answer.text}
        assert request.shell is not None
        calls = [
            {
                "index": index,
                "id": asking.call_id,
                "type": "function",
                "function": {
                    "name": request.shell.name,
                    "arguments": json.dumps(request.shell.arguments(asking.command)),
                },
            }
            for index, asking in enumerate(answer.asks)
        ]
        return {"role": "assistant", "content": answer.text or None, "tool_calls": calls}

    def _why(self, answer: Answer) -> str:
        return "tool_calls" if answer.asks else "stop"

    def _usage(self) -> Json:
        return {
            "prompt_tokens": USAGE["input"],
            "completion_tokens": USAGE["output"],
            "total_tokens": sum(USAGE.values()),
        }


class Responses:
    name = "responses"

    def read(self, body: Json, path: str) -> Request:
        items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
        tools = {tool.get("name") or tool["type"]: tool.get("parameters") or {} for tool in body.get("tools") or ()}
        return Request(
            model=body.get("model", ""),
            opening=_opening([item for item in items if "role" in item]),
            shell=_shell_among(tools),
            results=tuple(
                Result(item.get("call_id", ""), _words(item.get("output")))
                for item in items
                if str(item.get("type", "")).endswith("_call_output")
            ),
            stream=bool(body.get("stream")),
        )

    def whole(self, request: Request, answer: Answer) -> Json:
        return self._response(request, self._items(request, answer))

    def events(self, request: Request, answer: Answer) -> Iterator[tuple[str | None, Json | str]]:
        items = self._items(request, answer)
        number = 0

        def event(kind: str, **fields: Any) -> tuple[str, Json]:
            nonlocal number
            number += 1
            return kind, {"type": kind, "sequence_number": number - 1, **fields}

        begun = {**self._response(request, []), "status": "in_progress", "usage": None}
        yield event("response.created", response=begun)
        for index, item in enumerate(items):
            yield event("response.output_item.added", output_index=index, item={**item, "status": "in_progress"})
            if item["type"] == "message":
                yield event(
                    "response.output_text.delta",
                    item_id=item["id"],
                    output_index=index,
                    content_index=0,
                    delta=answer.text,
                )
            yield event("response.output_item.done", output_index=index, item=item)
        yield event("response.completed", response=self._response(request, items))

    def _items(self, request: Request, answer: Answer) -> list[Json]:
        if not answer.asks:
            text = {"type": "output_text", "text": answer.text, "annotations": []}
            return [
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]},
            ]
        assert request.shell is not None
        if request.shell.name == "local_shell":
            return [
                {
                    "type": "local_shell_call",
                    "id": f"ls_{asking.call_id}",
                    "call_id": asking.call_id,
                    "status": "completed",
                    "action": {"type": "exec", "command": ["bash", "-lc", asking.command], "env": {}},
                }
                for asking in answer.asks
            ]
        return [
            {
                "type": "function_call",
                "id": f"fc_{asking.call_id}",
                "call_id": asking.call_id,
                "name": request.shell.name,
                "arguments": json.dumps(request.shell.arguments(asking.command)),
                "status": "completed",
            }
            for asking in answer.asks
        ]

    def _response(self, request: Request, items: list[Json]) -> Json:
        return {
            "id": f"resp_{time.time_ns()}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "completed",
            "model": request.model,
            "output": items,
            "error": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": USAGE["input"],
                "output_tokens": USAGE["output"],
                "total_tokens": sum(USAGE.values()),
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }


class Messages:
    name = "messages"

    def read(self, body: Json, path: str) -> Request:
        results = []
        for message in body["messages"]:
            for block in message["content"] if isinstance(message["content"], list) else ():
                if block.get("type") == "tool_result":
                    results.append(Result(block.get("tool_use_id", ""), _words(block.get("content"))))
        tools = {tool["name"]: tool.get("input_schema") or {} for tool in body.get("tools") or () if "name" in tool}
        return Request(
            model=body.get("model", ""),
            opening=_opening(body["messages"]),
            shell=_shell_among(tools),
            results=tuple(results),
            stream=bool(body.get("stream")),
        )

    def whole(self, request: Request, answer: Answer) -> Json:
        return {**self._message(request), "content": self._blocks(request, answer), "stop_reason": self._why(answer)}

    def events(self, request: Request, answer: Answer) -> Iterator[tuple[str | None, Json | str]]:
        def event(kind: str, **fields: Any) -> tuple[str, Json]:
            return kind, {"type": kind, **fields}

        yield event("message_start", message=self._message(request))
        for index, block in enumerate(self._blocks(request, answer)):
            if block["type"] == "text":
                empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                partial = json.dumps(block["input"])
                empty, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": partial}
            yield event("content_block_start", index=index, content_block=empty)
            yield event("content_block_delta", index=index, delta=delta)
            yield event("content_block_stop", index=index)
        stop = {"stop_reason": self._why(answer), "stop_sequence": None}
        yield event("message_delta", delta=stop, usage={"output_tokens": USAGE["output"]})
        yield event("message_stop")

    def _message(self, request: Request) -> Json:
        return {
            "id": f"msg_{time.time_ns()}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": USAGE["input"], "output_tokens": USAGE["output"]},
        }

    def _blocks(self, request: Request, answer: Answer) -> list[Json]:
        if not answer.asks:
            return [{"type": "text", "text": answer.text}]
        assert request.shell is not None
        return [
            {
                "type": "tool_use",
                "id": asking.call_id,
                "name": request.shell.name,
                "input": request.shell.arguments(asking.command),
            }
            for asking in answer.asks
        ]

    def _why(self, answer: Answer) -> str:
        return "tool_use" if answer.asks else "end_turn"


class GenerateContent:
    name = "gemini"

    def read(self, body: Json, path: str) -> Request:
        declared = [f for tool in body.get("tools") or () for f in tool.get("functionDeclarations") or ()]
        parts = [part for content in body["contents"] for part in content.get("parts", ())]
        responses = [part["functionResponse"] for part in parts if "functionResponse" in part]
        return Request(
            model=path.partition("/models/")[2].partition(":")[0],
            opening=_opening(body["contents"], "parts"),
            shell=_shell_among(
                {f["name"]: f.get("parametersJsonSchema") or f.get("parameters") or {} for f in declared}
            ),
            results=tuple(Result(r.get("id", ""), _words(r.get("response"))) for r in responses),
            stream="streamGenerateContent" in path,
        )

    def whole(self, request: Request, answer: Answer) -> Json:
        parts: list[Json] = [{"text": answer.text}]
        if answer.asks:
            assert request.shell is not None
            tool = request.shell
            parts = [
                {"functionCall": {"id": asking.call_id, "name": tool.name, "args": tool.arguments(asking.command)}}
                for asking in answer.asks
            ]
        return {
            "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}],
            "usageMetadata": {
                "promptTokenCount": USAGE["input"],
                "candidatesTokenCount": USAGE["output"],
                "totalTokenCount": sum(USAGE.values()),
            },
            "modelVersion": request.model,
        }

    def events(self, request: Request, answer: Answer) -> Iterator[tuple[str | None, Json | str]]:
        yield None, self.whole(request, answer)


def dialect_of(path: str) -> Dialect | None:
    """By the path of a POST, query included; None: not one of the four."""
    bare = path.partition("?")[0]
    if bare.endswith("/messages"):
        return Messages()
    if bare.endswith("/responses"):
        return Responses()
    if bare.endswith("/chat/completions"):
        return ChatCompletions()
    if bare.endswith((":generateContent", ":streamGenerateContent")):
        return GenerateContent()
    return None


def token_count(path: str) -> Json | None:
    """The answer to a request to count tokens; None: it is not one."""
    bare = path.partition("?")[0]
    if bare.endswith("/count_tokens"):
        return {"input_tokens": 123}
    if bare.endswith(":countTokens"):
        return {"totalTokens": 123}
    return None
