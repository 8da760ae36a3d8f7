"""Schemas, grammars and forced tool calls: what is refused and why, and that the model is really held to the rest."""

from __future__ import annotations

import ipaddress
import json
import re
import uuid
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import pytest
from equipoise.gpuctl.engine.compute.language_model import LanguageModel
from equipoise.gpuctl.engine.compute.tool_calls import tool_calls_in
from equipoise.gpuctl.engine.errors import ConstraintError, RequestError
from equipoise.gpuctl.engine.openai.output_format import MAX_PARALLEL_CALLS, OutputFormat, output_format
from equipoise.gpuctl.engine.schedule.sequence import FinishReason, SamplingParams
from equipoise.tests.gpuctl.engine.asking import Asked

pytestmark = pytest.mark.engine
Schema = dict[str, Any]


def of_schema(schema: object) -> Schema:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def closed(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def function(name: str, **properties: Any) -> Schema:
    return {"type": "function", "function": {"name": name, "parameters": closed(properties)}}


def say(make_engine: Callable[..., Any], form: OutputFormat, seed: int = 1, tokens: int = 200) -> str:
    """What the real model says under the format; it must come to its end by itself."""
    engine, _ = make_engine()
    sampling = SamplingParams(temperature=1.0, seed=seed, constraint=form.constraint)
    turn = Asked(engine, "s", "Describe somebody, in JSON:\n", tokens, sampling=sampling)
    end = turn.finish()
    assert end.reason is FinishReason.STOP, (end, turn.text)
    return turn.text


def may_say(model: LanguageModel, form: OutputFormat, text: str) -> bool:
    assert form.constraint is not None
    matcher = form.constraint.matcher()
    for token in model.tokenize(text):
        logits = np.zeros(model.vocabulary_size, np.float32)
        matcher.restrict(logits)
        if logits[token]:
            return False
        matcher.accept(token)
    return True


NODE = closed({"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "value": {"enum": [1, 2]}})
# (schema, whether a value is one of it): written out by hand, so that no validator's reading is trusted twice.
HELD: dict[str, tuple[Schema, Callable[[Any], bool]]] = {
    "nested objects": (
        closed({"a": closed({"b": closed({"c": {"type": "boolean"}})})}),
        lambda v: list(v) == ["a"] and list(v["a"]) == ["b"] and isinstance(v["a"]["b"]["c"], bool),
    ),
    "enum and const": (
        closed({"colour": {"enum": ["red", 'quo"te', 3, None]}, "kind": {"const": {"x": [1]}}}),
        lambda v: v["colour"] in ("red", 'quo"te', 3, None) and v["kind"] == {"x": [1]},
    ),
    "array bounds": (
        {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 12}, "minItems": 2, "maxItems": 4},
        lambda v: 2 <= len(v) <= 4 and all(isinstance(n, int) and -3 <= n <= 12 for n in v),
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
        lambda v: len(v) == 2 and isinstance(v[0], bool) and v[1] is None,
    ),
    "any of": (
        {"anyOf": [closed({"a": {"type": "null"}}), {"type": "array", "items": {"const": 1}, "maxItems": 3}]},
        lambda v: v == {"a": None} or (isinstance(v, list) and set(v) <= {1}),
    ),
    "all of": (
        {"allOf": [{"type": "string", "maxLength": 3}, {"minLength": 2}]},
        lambda v: isinstance(v, str) and 2 <= len(v) <= 3,
    ),
    "optional properties": (
        closed({"must": {"type": "null"}, "may": {"type": "null"}}, ["must"]),
        lambda v: {"must"} <= set(v) <= {"must", "may"},
    ),
    "properties beyond the listed": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "required": ["a"],
            "additionalProperties": {"type": "boolean"},
        },
        lambda v: v["a"] is None and all(isinstance(v[key], bool) for key in v if key != "a"),
    ),
    "no properties beyond the listed": (closed({"a": {"type": "null"}}), lambda v: v == {"a": None}),
    "several types": ({"type": ["boolean", "null"]}, lambda v: v is None or isinstance(v, bool)),
    "date": ({"type": "string", "format": "date"}, lambda v: bool(date.fromisoformat(v))),
    "uuid": ({"type": "string", "format": "uuid"}, lambda v: bool(uuid.UUID(v))),
    "address": ({"type": "string", "format": "ipv4"}, lambda v: bool(ipaddress.IPv4Address(v))),
    "pattern": ({"type": "string", "pattern": "^[a-f]{3}-[0-9]x$"}, lambda v: bool(re.fullmatch("[a-f]{3}-[0-9]x", v))),
    "text beyond ASCII": (closed({"größe": {"const": "日本 \\ \n"}}), lambda v: v == {"größe": "日本 \\ \n"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_the_model_is_held_to_the_schema(model, make_engine, name):
    schema, is_one = HELD[name]
    value = json.loads(say(make_engine, output_format(of_schema(schema), model)))
    assert is_one(value), value


def test_a_schema_may_contain_itself(model):
    form = output_format(of_schema({"$defs": {"node": NODE}, "$ref": "#/$defs/node"}), model)
    inner = '{"next": null, "value": 1}'
    assert may_say(model, form, f'{{"next": {inner}, "value": 2}}')
    assert not may_say(model, form, f'{{"next": {inner}, "value": 3}}')


def test_json_object_is_any_object(model, make_engine):
    form = output_format({"response_format": {"type": "json_object"}}, model)
    engine, _ = make_engine()
    turn = Asked(
        engine, "s", "JSON: ", 60, sampling=SamplingParams(temperature=0.7, seed=5, constraint=form.constraint)
    )
    turn.finish()
    assert turn.text.startswith("{")


def test_greedy_and_sampled_turns_are_held_alike_and_report_what_the_model_thought(model, make_engine):
    form = output_format({"grammar": '%llguidance {}\nstart: "yes" | "no"'}, model)
    engine, _ = make_engine()
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(temperature=temperature, seed=1, constraint=form.constraint, logprobs=2)
        turn = Asked(engine, f"s{temperature}", "Is water wet? Answer:", 8, sampling=sampling)
        turn.finish()
        assert turn.text in ("yes", "no")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (None, "give an object"),
        ([], "give an object"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
        ({"type": "object", "properties": 3}, "properties"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_the_reason(model, schema, word):
    with pytest.raises(RequestError, match="response_format") as refused:
        output_format(of_schema(schema), model)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "rules",
    [
        "start: nope",
        "start: " + "(" * 5000 + '"a"' + ")" * 5000,
        "start: " + "(" * 200_000,
        "start: [",
        'start: "a"{4000000000}',
    ],
)
def test_a_grammar_that_cannot_be_built_is_refused(model, rules):
    with pytest.raises(RequestError, match="grammar"):
        output_format({"grammar": f"%llguidance {{}}\n{rules}"}, model)


def test_gbnf_is_refused_with_what_to_give_instead(model):
    with pytest.raises(RequestError, match="Lark"):
        output_format({"grammar": 'root ::= "yes"'}, model)


@pytest.mark.parametrize("rules", ["start: start", "start: " + '("a"|"") ' * 5000])
def test_a_grammar_that_allows_nothing_or_takes_for_ever_fails_its_own_turn_only(model, make_engine, rules):
    form = output_format({"grammar": f"%llguidance {{}}\n{rules}"}, model)
    assert form.constraint is not None
    with pytest.raises(ConstraintError):
        matcher = form.constraint.matcher()
        matcher.restrict(np.zeros(model.vocabulary_size, np.float32))
    engine, _ = make_engine()
    alone = Asked(engine, "alone", "Once upon a time", 20)
    alone.finish()
    beside = Asked(engine, "beside", "Once upon a time", 20)
    failing = Asked(engine, "bad", "Hello", 8, sampling=SamplingParams(constraint=form.constraint))
    end = failing.finish()
    assert end.reason is FinishReason.ERROR
    assert end.error
    beside.finish()
    assert beside.text == alone.text


def test_the_output_may_not_go_on_beyond_a_complete_value(model, make_engine):
    form = output_format(of_schema({"const": 7}), model)
    engine, _ = make_engine()
    sampling = SamplingParams(constraint=form.constraint)
    turn = Asked(engine, "s", "Seven: ", 10, sampling=sampling, ignore_end_of_text=True)
    assert turn.finish().output_tokens == 10
    assert turn.text == "7"


# Tools

TOOLS = [function("run", command={"enum": ["ls", "make"]}), function("stop")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_required_is_one_call_of_a_tool_with_arguments_that_fit(model, make_engine, seed):
    form = output_format({"tools": TOOLS, "tool_choice": "required"}, model)
    before, calls = tool_calls_in(say(make_engine, form, seed))
    (call,) = calls
    assert before == ""
    arguments = json.loads(call.arguments)
    assert (call.name, arguments) in [("run", {"command": "ls"}), ("run", {"command": "make"}), ("stop", {})]


def test_a_named_function_is_the_one_that_is_called(model, make_engine):
    form = output_format({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "stop"}}}, model)
    _, (call,) = tool_calls_in(say(make_engine, form))
    assert (call.name, json.loads(call.arguments)) == ("stop", {})


def test_several_calls_come_only_where_they_are_wanted(model, make_engine):
    form = output_format({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True}, model)
    _, calls = tool_calls_in(say(make_engine, form, tokens=400))
    assert 1 <= len(calls) <= MAX_PARALLEL_CALLS
    assert {call.name for call in calls} <= {"run", "stop"}


def test_a_tools_parameters_may_refer_to_their_own_definitions(model, make_engine):
    parameters = {**closed({"unit": {"$ref": "#/$defs/unit"}}), "$defs": {"unit": {"enum": ["C", "F"]}}}
    tools = [{"type": "function", "function": {"name": "heat", "parameters": parameters}}]
    _, (call,) = tool_calls_in(say(make_engine, output_format({"tools": tools, "tool_choice": "required"}, model)))
    assert json.loads(call.arguments)["unit"] in ("C", "F")


def test_with_tools_and_a_schema_the_answer_is_one_or_the_other(model, make_engine):
    form = output_format({"tools": TOOLS, **of_schema({"const": "done"})}, model)
    for seed in (1, 2, 3):
        text = say(make_engine, form, seed, tokens=400)
        assert text == '"done"' or tool_calls_in(text)[1]


def test_tool_choice_none_hides_the_tools(model):
    assert output_format({"tools": TOOLS, "tool_choice": "none"}, model) == OutputFormat()


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"function": 5}]}, "tools[0]"),
        ({"tools": [{"function": {"name": 5}}]}, "tools[0]"),
        ({"tools": [{"function": {"name": "a", "parameters": 5}}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "fly"}}}, "fly"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "grammar": "x"}, "grammar"),
        ({"response_format": 5}, "response_format"),
        ({"response_format": {"type": "xml"}}, "xml"),
        ({"grammar": 5}, "grammar"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(model, body, word):
    with pytest.raises(RequestError) as refused:
        output_format(body, model)
    assert word in str(refused.value)
