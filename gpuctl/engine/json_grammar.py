"""JSON Schema to GBNF, the grammar llama.cpp's sampler holds a model to.

Owns: the subset of JSON Schema served: type, properties, required, additionalProperties (false or absent: only what is
listed), items, minItems, maxItems, enum, const, minLength, maxLength, anyOf, oneOf, $ref into the same document. Must
not: pretend: a keyword outside the subset that would change what is valid is an error that names its path.
Objects are written with their properties in the order of the schema, without free white space beyond one blank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import RequestError

_PRIMITIVES = {
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_SHARED = {
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4})',
    "space": '" "?',
}
_UNDERSTOOD = {
    "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const",
    "minLength", "maxLength", "anyOf", "oneOf", "$ref", "$defs", "definitions",
    # Said about a value, not asked of it.
    "title", "description", "default", "examples", "$schema", "$id", "strict", "format",
}  # fmt: skip


def grammar_of_schema(schema: object) -> str:
    """GBNF whose root is a value of `schema`. Raises RequestError naming the path of what is not understood."""
    return _Grammar(schema).text()


def grammar_of_any_object() -> str:
    """GBNF of any JSON object: OpenAI's response_format json_object."""
    rules = {
        **_SHARED,
        **_PRIMITIVES,
        "value": "object | array | string | number | boolean | null",
        "member": 'string space ":" space value',
        "object": '"{" space (member (space "," space member)*)? space "}"',
        "array": '"[" space (value (space "," space value)*)? space "]"',
        "root": "object",
    }
    return _text(rules)


class _Grammar:
    def __init__(self, schema: object) -> None:
        self._whole = schema
        self._rules: dict[str, str] = dict(_SHARED)
        self._of_ref: dict[str, str] = {}
        self._rules["root"] = self._expression(schema, "schema")

    def text(self) -> str:
        return _text(self._rules)

    def _expression(self, schema: object, path: str) -> str:
        if not isinstance(schema, Mapping):
            raise _error(path, "give an object")
        unknown = [key for key in schema if key not in _UNDERSTOOD]
        if unknown:
            raise _error(f"{path}.{unknown[0]}", "not understood by this engine")
        if "$ref" in schema:
            return self._reference(schema["$ref"], path)
        if "const" in schema:
            return _literal(schema["const"])
        if "enum" in schema:
            return self._rule(path, " | ".join(_literal(value) for value in schema["enum"]))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                choices = [self._expression(s, f"{path}.{key}[{i}]") for i, s in enumerate(schema[key])]
                return self._rule(path, " | ".join(choices))
        return self._typed(schema, path)

    def _typed(self, schema: Mapping[str, Any], path: str) -> str:
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            choices = [self._typed({**schema, "type": one}, f"{path}.{one}") for one in kind]
            return self._rule(path, " | ".join(choices))
        if kind == "object":
            return self._object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            span = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
            return self._rule(path, rf'"\"" char{span} "\""')
        if kind in _PRIMITIVES:
            self._rules[kind] = _PRIMITIVES[kind]
            return str(kind)
        raise _error(f"{path}.type", f"{kind!r}: give a JSON type")

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        if schema.get("additionalProperties") not in (None, False):
            raise _error(f"{path}.additionalProperties", "only listed properties can be served")
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        members = [
            (
                f'{_literal(name)} space ":" space {self._expression(value, f"{path}.properties.{name}")}',
                name in required,
            )
            for name, value in properties.items()
        ]
        return self._rule(path, f'"{{" space {self._members(members, path)} space "}}"')

    def _members(self, members: list[tuple[str, bool]], path: str) -> str:
        """Members in order, those not required left out at will, commas only between two that are there.

        `rest-i` is what may follow once something was written, `start-i` what may come while nothing was.
        """
        rest = start = '""'
        for index, (member, is_required) in reversed(list(enumerate(members))):
            after = self._rule(f"{path} rest {index}", rest) if rest != '""' else ""
            here = f'space "," space {member} {after}'.strip()
            first = f"{member} {after}".strip()
            start = first if is_required else f"{first} | {start}"
            if not is_required:
                start = self._rule(f"{path} start {index}", start)
            rest = here if is_required else f"({here}) | {after or chr(34) * 2}"
        return start

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        item = self._expression(schema.get("items", {"type": "string"}), f"{path}.items")
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        if high == 0:
            return '"[" space "]"'
        more = f'(space "," space {item}){{{max(0, low - 1)},{"" if high is None else int(high) - 1}}}'
        body = f"{item} {more}"
        return self._rule(path, f'"[" space {body if low else f"({body})?"} space "]"')

    def _reference(self, reference: object, path: str) -> str:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise _error(f"{path}.$ref", "only references into the same document (#/...) can be served")
        if reference not in self._of_ref:
            name = f"ref-{len(self._of_ref)}"
            self._of_ref[reference] = name  # before it is built: a schema may contain itself
            target = self._whole
            for key in reference[2:].split("/"):
                if not isinstance(target, Mapping) or key not in target:
                    raise _error(f"{path}.$ref", f"{reference} leads nowhere")
                target = target[key]
            self._rules[name] = self._expression(target, reference)
        return self._of_ref[reference]

    def _rule(self, path: str, body: str) -> str:
        name = f"rule-{len(self._rules)}"
        self._rules[name] = body
        return name


def _literal(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _text(rules: Mapping[str, str]) -> str:
    return "\n".join(f"{name} ::= {body}" for name, body in rules.items())


def _error(path: str, reason: str) -> RequestError:
    return RequestError(f"response_format: {path}: {reason}", param="response_format")
