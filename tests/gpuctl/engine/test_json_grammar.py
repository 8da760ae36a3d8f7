"""What a schema becomes, what is refused, and that the sampler really holds the model to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from equipoise.gpuctl.engine.errors import RequestError
from equipoise.gpuctl.engine.json_grammar import grammar_of_any_object, grammar_of_schema
from equipoise.gpuctl.engine.sequence import SamplingParams
from equipoise.tests.gpuctl.engine.asking import Asked

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "nick": {"type": ["string", "null"], "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", 'quo"te']}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
}
LIST = {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}, "schema.properties.a.pattern"),
        ({"type": "nonsense"}, "schema.type"),
        ({"$ref": "#/nowhere"}, "schema.$ref"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "schema.additionalProperties"),
        (None, "schema"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_path(schema, path):
    with pytest.raises(RequestError, match=path.replace("$", r"\$").replace(".", r"\.")):
        grammar_of_schema(schema)


@pytest.mark.engine
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_model_is_held_to_the_schema(make_engine, seed):
    engine, _ = make_engine()
    sampling = SamplingParams(temperature=1.0, seed=seed, grammar=grammar_of_schema(PERSON))
    turn = Asked(engine, f"s{seed}", "Describe a person as JSON: ", 120, sampling=sampling)
    turn.finish()
    person = json.loads(turn.text)
    assert isinstance(person["name"], str)
    assert 1 <= len(person["tags"]) <= 2
    assert set(person["tags"]) <= {"a", 'quo"te'}
    assert set(person) <= set(PERSON["properties"])


@pytest.mark.engine
def test_a_schema_may_contain_itself_and_any_object_is_served(make_engine):
    engine, _ = make_engine()
    for session, grammar in (("list", grammar_of_schema(LIST)), ("any", grammar_of_any_object())):
        sampling = SamplingParams(temperature=0.7, seed=5, grammar=grammar)
        turn = Asked(engine, session, "JSON: ", 160, sampling=sampling)
        end = turn.finish()
        if end.output_tokens < 160:
            assert isinstance(json.loads(turn.text), dict)
        else:
            assert turn.text.startswith("{")
