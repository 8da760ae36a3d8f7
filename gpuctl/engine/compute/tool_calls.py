"""Finds tool calls in a model's output: JSON objects between <tool_call> and </tool_call>.

Owns: that format. Must not: constrain the output to it (output_format.py). Text before the first call is the answer's
content, less the white space before the call; text after it is dropped; a malformed call stays text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ....policies.model import AskedToolCall
from .text import overlap

OPENS = "<tool_call>"
CLOSES = "</tool_call>"

_CALL = re.compile(rf"{OPENS}\s*(\{{.*?\}})\s*{CLOSES}", re.DOTALL)
_MAY_BECOME_CALL = re.compile(rf"{OPENS}\s*(\{{|$)")


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """JSON text."""


_COMMAND_KEYS = ("command", "cmd", "script", "code", "shell_command")
_LONGEST_COMMAND = 4096


def call_id(turn_id: str, number: int) -> str:
    """By which the conversation knows a turn's call: the same for its client and for the daemon."""
    return f"call_{hashlib.sha256(f'{turn_id}/{number}'.encode()).hexdigest()[:24]}"


def asked_for(turn_id: str, calls: Sequence[ToolCall]) -> tuple[AskedToolCall, ...]:
    """What the daemon is told of a turn's calls."""
    return tuple(
        AskedToolCall(call_id(turn_id, number), call.name, command_of(call.arguments)[:_LONGEST_COMMAND])
        for number, call in enumerate(calls)
    )


def command_of(arguments: str) -> str:
    """The shell command in a call's arguments: a text, or words; "" where there is none."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return ""
    if not isinstance(values, dict):
        return ""
    found = next((values[key] for key in _COMMAND_KEYS if key in values), "")
    if isinstance(found, list):
        return " ".join(word for word in found if isinstance(word, str))
    return found if isinstance(found, str) else ""


def tool_calls_in(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the first tool call, and the calls."""
    stream = ToolCallStream()
    before, calls = stream.push(text)
    return before + stream.flush(), calls


class ToolCallStream:
    """The same as the text arrives: what cannot belong to a call any more comes out at once."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text now certain to be content, and the calls now complete."""
        self._held += text
        content, calls = "", []
        while (at := self._held.find(OPENS)) >= 0:
            if (match := _CALL.match(self._held, at)) is not None:
                if (call := _parsed(match[1])) is None:
                    content += self._release(match.end())
                    continue
                before, self._held = self._held[:at].rstrip(), self._held[match.end() :]
                content += "" if self._called else before
                self._called = True
                calls.append(call)
            elif _MAY_BECOME_CALL.match(self._held, at):
                return content + self._release(len(self._held[:at].rstrip())), calls
            else:
                content += self._release(at + len(OPENS))
        end = len(self._held) - overlap(self._held, OPENS)
        return content + self._release(len(self._held[:end].rstrip())), calls

    def flush(self) -> str:
        """The rest: the text has ended."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return "" if self._called else text


def _parsed(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
