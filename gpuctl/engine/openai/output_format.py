"""What a request wants its output held to: `response_format`, `tool_choice`, `grammar`; compiled before it is queued.

Owns: the meaning of those fields, and the grammar that lets an answer be tool calls, JSON, or either. Must not: find
calls in output (tool_calls.py) or enforce anything itself (constraint.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compute.constraint import Constraint
from ..compute.language_model import LanguageModel
from ..compute.tool_calls import CLOSES, OPENS
from ..errors import ConstraintError, RequestError

Json = dict[str, Any]
Schema = Mapping[str, Any]

LARK_MARK = "%llguidance"
"""How a Lark grammar begins, for llama.cpp's own server as well."""
MAX_PARALLEL_CALLS = 8
# On one line, a blank after each separator: as models write JSON, and no room for the endless blanks they fall into.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    constraint: Constraint | None = None
    tools: tuple[Schema, ...] = ()
    """The functions the model is told of."""


def output_format(body: Json, model: LanguageModel) -> OutputFormat:
    """The format a body asks for. Raises RequestError naming the field, with llguidance's reason where it has one."""
    tools = _tools(body)
    schema = _schema(body)
    forced = _forced(body, tools)
    if body.get("tool_choice") == "none":
        tools = ()
    grammar = body.get("grammar")
    if grammar is not None:
        if schema is not None or forced:
            raise RequestError("grammar: give either it or response_format or tool_choice", param="grammar")
        return OutputFormat(_own_grammar(grammar, model), tools)
    if forced:
        calls = _calls(forced, parallel=body.get("parallel_tool_calls") is True)
        return OutputFormat(_compiled(model, f"start: calls\n{calls}", "tools"), tools)
    if schema is None:
        return OutputFormat(tools=tools)
    answer = f"answer: %json {_json(schema)}"
    if not tools:
        return OutputFormat(_compiled(model, f"start: answer\n{answer}", "response_format"))
    calls = _calls(tools, parallel=body.get("parallel_tool_calls") is not False)
    return OutputFormat(_compiled(model, f"start: answer | calls\n{answer}\n{calls}", "response_format"), tools)


def _own_grammar(grammar: object, model: LanguageModel) -> Constraint:
    # GBNF is not taken: llama.cpp's matcher for it ends the process on a grammar that allows nothing, and one of a few
    # kilobytes (`("a"|"")` over and over) keeps it busy for ever. llguidance bounds both.
    if not isinstance(grammar, str) or not grammar.startswith(LARK_MARK):
        raise RequestError(f"grammar: give llguidance's Lark, beginning with `{LARK_MARK} {{}}`", param="grammar")
    try:
        return model.constraint("lark", grammar)
    except ConstraintError as error:
        raise RequestError(f"grammar: {error}", param="grammar") from None


def _schema(body: Json) -> Schema | None:
    """The JSON Schema of response_format; None for text."""
    wanted = body.get("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise RequestError("response_format: give an object with a type", param="response_format")
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            described = wanted.get("json_schema")
            schema = described.get("schema") if isinstance(described, Mapping) else None
            if not isinstance(schema, Mapping):
                raise RequestError("response_format.json_schema.schema: give an object", param="response_format")
            return schema
        case other:
            raise RequestError(f"response_format.type: {other!r}: give text, json_object or json_schema",
                               param="response_format")  # fmt: skip


def _tools(body: Json) -> tuple[Schema, ...]:
    tools = body.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise RequestError("tools: give a list", param="tools")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise RequestError(f"{where}: give {{type: function, function: ...}}; no other type is served", param=where)
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{where}.function: give an object with a name", param=where)
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise RequestError(f"{where}.function.parameters: give a JSON Schema object", param=where)
    return tuple(tools)


def _forced(body: Json, tools: Sequence[Schema]) -> tuple[Schema, ...]:
    """The functions of which one must be called; empty where none need be."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return ()
    if choice == "required":
        wanted = tuple(tools)
    elif isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        wanted = tuple(tool for tool in tools if tool["function"]["name"] == choice["function"].get("name"))
    else:
        raise RequestError(f"tool_choice: {choice!r}: give none, auto, required or a function", param="tool_choice")
    if not wanted:
        raise RequestError(f"tool_choice: {choice!r}: no such function in tools", param="tool_choice")
    return wanted


def _calls(tools: Sequence[Schema], *, parallel: bool) -> str:
    """Lark rules: `calls` is one call of one of the functions, or up to MAX_PARALLEL_CALLS."""
    rules = [
        f'function_{index}: {_text(_prefix(tool))} %json {_json(tool["function"].get("parameters") or {})} "}}"'
        for index, tool in enumerate(tools)
    ]
    names = " | ".join(f"function_{index}" for index in range(len(tools)))
    more = f' ("\\n" call){{0,{MAX_PARALLEL_CALLS - 1}}}' if parallel else ""
    return "\n".join(
        [f"calls: call{more}", f"call: {_text(OPENS + chr(10))} ({names}) {_text(chr(10) + CLOSES)}", *rules]
    )


def _prefix(tool: Schema) -> str:
    return f'{{"name": {json.dumps(tool["function"]["name"], ensure_ascii=False)}, "arguments": '


def _text(text: str) -> str:
    """A Lark string: JSON's escapes are Lark's."""
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Schema) -> str:
    # No schema at all: OpenAI's way to say "any object" of a function's parameters.
    return json.dumps({"x-guidance": _SPACING, **(schema or {"type": "object"})}, ensure_ascii=False)


def _compiled(model: LanguageModel, rules: str, field: str) -> Constraint:
    try:
        return model.constraint("lark", f"{LARK_MARK} {{}}\n{rules}\n")
    except ConstraintError as error:
        raise RequestError(f"{field}: {error}", param=field) from None
