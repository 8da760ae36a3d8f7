"""YAML text as plain values, with line and column of each, and what is wrong with the text itself.

Owns what YAML means here: plain scalars, lists, mappings with every key once, aliases and merges (`<<`) as far as they
stay small. The grammar of a policy is policies/document's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ...policies.document import Problem

Path = tuple[str | int, ...]
MOST_VALUES = 20_000
"""Aliases expanded: a text of some hundred bytes can stand for more than fits any memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; counted from 1, as editors do."""

    file: str
    line: int
    column: int


@dataclass(slots=True)
class Read:
    """One text, read."""

    value: Any = None
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    wrong: list[tuple[Place, Problem | str]] = field(default_factory=list)
    """What the text itself makes wrong; a bare text is no YAML at all."""


def read(text: str, file: str) -> Read:
    """Never raises: what is wrong is in `wrong`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        place = Place(file, mark.line + 1, mark.column + 1) if mark else _place_of(error, text, file)
        return Read(wrong=[(place, f"not YAML: {problem}")])
    except RecursionError:
        return Read(wrong=[(Place(file, 1, 1), "not YAML for people: nested too deeply")])
    except (ValueError, OverflowError) as error:  # an escape that is no character
        return Read(wrong=[(Place(file, 1, 1), f"not YAML: {error}")])
    walk = _Walk(file)
    if node is not None:
        walk.read.value = walk.value(node, (), frozenset())
    return walk.read


def _place_of(error: yaml.YAMLError, text: str, file: str) -> Place:
    """Of an error without a mark: a character that YAML does not allow."""
    before = text[: getattr(error, "position", 0) or 0]
    return Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


class _Walk:
    def __init__(self, file: str) -> None:
        self.read = Read()
        self._file = file
        self._scalars = yaml.constructor.SafeConstructor()
        self._count = 0

    def value(self, node: yaml.Node, path: Path, within: frozenset[int]) -> Any:
        """The plain value of a node; None, and a word of what is wrong, for one that has none."""
        self.read.values[path] = self._place(node)
        self._count += 1
        if self._count > MOST_VALUES:
            if self._count == MOST_VALUES + 1:
                self._say(node, path, f"more than {MOST_VALUES} values, aliases counted as often as they are used")
            return None
        if id(node) in within:
            return self._say(node, path, "an alias of what it stands in")
        within |= {id(node)}
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, within)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each, (*path, number), within) for number, each in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path, within: frozenset[int]) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        first: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                value = self.value(value_node, path, within)
                for each in value if isinstance(value, list) else [value]:
                    merged = (each if isinstance(each, dict) else {}) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._say(key_node, path, "keys are words")
                continue
            key = self._scalar(key_node, path)
            inner = (*path, key)
            if key in own:
                self._say(key_node, inner, f"is given twice: first in line {first[key]}", about_key=True)
            first.setdefault(key, key_node.start_mark.line + 1)
            self.read.keys[inner] = self._place(key_node)
            own[key] = self.value(value_node, inner, within)
        return {**merged, **own}

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            # PyYAML looks into what it is told to be an int, a date or a truth without asking whether it is one.
            return self._say(node, path, f"is no value of the kind {node.tag.rpartition(':')[2]}")

    def _say(self, node: yaml.Node, path: Path, text: str, *, about_key: bool = False) -> None:
        self.read.wrong.append((self._place(node), Problem(path, text, about_key)))

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._file, node.start_mark.line + 1, node.start_mark.column + 1)
