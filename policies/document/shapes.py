"""What a place of a document may hold: a single value, a group of known keys, named entries, a list.

Owns the walk that reads a document by such a shape and collects all that is wrong with it, and the JSON Schema of the
same shape: one table, two readers. Knows of no key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .problems import Path, Problem, kind, near
from .quantities import Wrong

Say = Callable[[Path, str], None]
"""Say what is wrong at a place relative to the group."""
Values = Mapping[str, Any]
"""What was read of a group's keys; those that are absent, or wrong, are not in it."""
ABSENT = object()


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `read` raises Wrong."""

    read: Callable[[object], Any]
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a group."""

    name: str
    shape: Shape
    about: str
    """What it does, for editors."""
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Known keys, all optional unless `needed`. `make` makes the value of them, and says where they contradict."""

    keys: tuple[Key, ...]
    make: Callable[[Values, Say], Any] = lambda values, say: dict(values)


@dataclass(frozen=True, slots=True)
class Named:
    """Entries by names of the operator's choice: a dict, in the order written."""

    of: Shape
    name: Callable[[object], Any]
    """Raises Wrong for what is no name."""
    pattern: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A list: a tuple, without what was wrong."""

    of: Shape


Shape = Scalar | Group | Named | Listed


@dataclass(slots=True)
class Reading:
    """One walk through a document."""

    problems: list[Problem] = field(default_factory=list)

    def read(self, shape: Shape, value: object, path: Path = ()) -> Any:
        """The value that `value` stands for; ABSENT where it is wrong, which has been said then."""
        match shape:
            case Scalar():
                try:
                    return shape.read(value)
                except Wrong as wrong:
                    self._say(path, str(wrong))
                    return ABSENT
            case Group():
                return self._group(shape, value, path)
            case Named():
                return self._named(shape, value, path)
            case Listed():
                if value is None:
                    return ()
                if not isinstance(value, list):
                    self._say(path, f"expected a list, found {kind(value)}")
                    return ABSENT
                found = [self.read(shape.of, each, (*path, number)) for number, each in enumerate(value)]
                return tuple(each for each in found if each is not ABSENT)

    def _group(self, group: Group, value: object, path: Path) -> Any:
        mapping = self._mapping(value, path)
        if mapping is None:
            return ABSENT
        known = {key.name: key for key in group.keys}
        values = {}
        before = len(self.problems)
        wrong = False
        for name, inner in mapping.items():
            if name not in known:
                self._say((*path, name), f"unknown key; {near(name, known)}", about_key=True)
                continue
            values[name] = self.read(known[name].shape, inner, (*path, name))
            wrong = wrong or values[name] is ABSENT
        for key in group.keys:
            if key.needed and key.name not in mapping:
                self._say((*path, key.name), f"is missing: {key.about}")
                wrong = True
        if wrong:
            return ABSENT  # what its keys say together is not known
        made = group.make(values, lambda place, text: self._say((*path, *place), text))
        return made if len(self.problems) == before else ABSENT

    def _named(self, named: Named, value: object, path: Path) -> Any:
        mapping = self._mapping(value, path)
        if mapping is None:
            return ABSENT
        read = {}
        for name, inner in mapping.items():
            try:
                named.name(name)
            except Wrong as wrong:
                self._say((*path, name), str(wrong), about_key=True)
                continue
            if (entry := self.read(named.of, inner, (*path, name))) is not ABSENT:
                read[name] = entry
        return read

    def _mapping(self, value: object, path: Path) -> Mapping[str, object] | None:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._say(path, f"expected a mapping, found {kind(value)}")
            return None
        for key in value:
            if not isinstance(key, str):
                self._say(path, f"keys are words, found {kind(key)}")
        return {key: inner for key, inner in value.items() if isinstance(key, str)}

    def _say(self, path: Path, text: str, *, about_key: bool = False) -> None:
        self.problems.append(Problem(path, text, about_key))


def schema(shape: Shape) -> dict[str, Any]:
    """The shape as JSON Schema. What only `make` knows (soft above hard) it can not say."""
    match shape:
        case Scalar():
            return dict(shape.schema)
        case Group():
            made: dict[str, Any] = {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {key.name: {"description": key.about, **schema(key.shape)} for key in shape.keys},
            }
            needed = [key.name for key in shape.keys if key.needed]
            return made | ({"required": needed, "type": "object"} if needed else {})
        case Named():
            entries = {shape.pattern: schema(shape.of)}
            return {"type": ["object", "null"], "additionalProperties": False, "patternProperties": entries}
        case Listed():
            return {"type": ["array", "null"], "items": schema(shape.of)}
