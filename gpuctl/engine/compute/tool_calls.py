"""Finds tool calls in a model's output: JSON objects between <tool_call> and </tool_call>.

Owns: that format. Must not: constrain the output to it (output_format.py). Text before the first call is the answer's
content, less the white space before the call; text after it is dropped; a malformed call stays text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

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
