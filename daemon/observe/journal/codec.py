"""Frozen dataclasses to JSON and back, by their own type hints.

Owns the mapping for the kinds of fields that facts and actions have: numbers, text and its subclasses, enums, None,
nested dataclasses, tuples and frozensets, and unions of dataclasses (tagged with "type"). A field that the reader's
class does not know is ignored and one that the text lacks takes its default, so that journals survive a version's added
fields.
"""

from __future__ import annotations

import dataclasses
import json
import types
from enum import Enum
from functools import cache
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def dumps(value: object) -> str:
    """Compact JSON of a dataclass instance."""
    return json.dumps(_plain(value), separators=(",", ":"))


def loads(kind: type[T], text: str) -> T:
    """The instance that `dumps` was given. Raises ValueError where the text is none of that kind."""
    try:
        value = _build(kind, json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}: {text[:80]}")  # noqa: TRY004 - the text is wrong, not our call
    return value


_AS_IT_IS = frozenset((int, float, str, bool, type(None)))


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """None: no dataclass. Remembered: asking the class costs more than all the rest."""
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _plain(value: object) -> object:
    kind: Any = type(value)
    if kind in _AS_IT_IS:
        return value
    if (names := _field_names(kind)) is not None:
        return {"type": kind.__name__, **{name: _plain(getattr(value, name)) for name in names}}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, frozenset):
        return sorted(_plain(v) for v in value)  # type: ignore[type-var]  # members are text or numbers
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(hint: Any, value: Any) -> Any:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _build_union(get_args(hint), value)
    if origin is tuple:
        return tuple(_build(get_args(hint)[0], v) for v in value)
    if origin is frozenset:
        return frozenset(_build(get_args(hint)[0], v) for v in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = _hints(hint)
        known = [f.name for f in dataclasses.fields(hint) if f.name in value]
        return hint(**{name: _build(hints[name], value[name]) for name in known})
    if isinstance(hint, type) and issubclass(hint, str) and hint is not str:
        return hint(value)
    if hint is float:
        return float(value)
    return value


def _build_union(members: tuple[Any, ...], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        for member in members:
            if getattr(member, "__name__", None) == value.get("type"):
                return _build(member, value)
        raise ValueError(f"unknown kind {value.get('type')!r}")
    return _build(next(m for m in members if m is not type(None)), value)
