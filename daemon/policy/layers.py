"""Layers of a policy: texts, each said over the ones before it, as one document.

Owns what "over" means: mappings are joined key by key, anything else is replaced, and nothing (`key:` or `null`) takes
what stood there away, so that it has its default again. A key that only the later text has comes first: of classes of
calls the first that matches counts. Whatever is wrong is said with the file, line and column of the layer it is from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ...policies.document import DocumentError, Problem, parse_policy, place, written
from ...policies.policy import Policy
from ..errors import PolicyError, PolicyProblem
from .places import Path, Place, Read, read

MOST_CHARACTERS = 1 << 17
"""Of all layers: read within a second, in which nobody else is answered; the kernel asks for a heartbeat every 3 s."""


@dataclass(frozen=True, slots=True)
class Text:
    """One layer."""

    name: str
    """Of its file, as errors say it."""
    text: str


def policy_of(layers: Sequence[Text]) -> Policy:
    """The policy of these texts, the last over the others. Raises PolicyError with all that is wrong, a line each."""
    if (size := sum(len(layer.text) for layer in layers)) > MOST_CHARACTERS:
        problem = f"{size} characters of policy are more than {MOST_CHARACTERS}: leave out what no policy needs"
        raise PolicyError(PolicyProblem(layers[0].name, problem))
    reads = [read(layer.text, layer.name) for layer in layers]
    wrong = [_said(where, problem) for each in reads for where, problem in each.wrong]
    if any(isinstance(problem, str) for each in reads for _, problem in each.wrong):
        raise PolicyError(*wrong)  # what is no YAML would only be missing below
    merged = reads[0]
    for later in reads[1:]:
        merged = _over(merged, later)
    try:
        policy = parse_policy(merged.value)
    except DocumentError as error:
        first = Place(layers[0].name, 1, 1)
        wrong += [_said(_place_of(problem, merged, first), problem) for problem in error.problems]
        raise PolicyError(*sorted(wrong, key=lambda each: (each.file, each.line, each.column))) from error
    if wrong:
        raise PolicyError(*wrong)
    return policy


def dump(policy: Policy) -> str:
    """The document that says the same with every default, as YAML."""
    return str(yaml.dump(written(policy), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Small mappings on one line, as people write them."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = all(isinstance(value, yaml.ScalarNode) for _, value in node.value) and len(node.value) < 5
        return node


def _over(below: Read, above: Read) -> Read:
    return Read(_joined(below.value, above.value), below.values | above.values, below.keys | above.keys)


def _joined(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    fresh = {key: value for key, value in above.items() if key not in below and value is not None}
    return fresh | {
        key: _joined(value, above[key]) if key in above else value
        for key, value in below.items()
        if key not in above or above[key] is not None
    }


def _place_of(problem: Problem, merged: Read, otherwise: Place) -> Place:
    """Where the value stands, or the key where that is what is wrong; what is missing is missing in its mapping."""
    path: Path = problem.path
    if problem.about_key and path in merged.keys:
        return merged.keys[path]
    while path and path not in merged.values:
        path = path[:-1]
    if len(path) < len(problem.path) and path in merged.keys:
        return merged.keys[path]
    return merged.values.get(path, otherwise)


def _said(where: Place, problem: Problem | str) -> PolicyProblem:
    if isinstance(problem, str):
        return PolicyProblem(where.file, problem, where.line, where.column)
    return PolicyProblem(where.file, problem.text, where.line, where.column, place(problem.path))
