"""Dataclasses and protobuf messages, field by field: the one table that hook, client, peers and views use.

Owns: how a value of each kind crosses, derived once from a dataclass's type hints and a message's descriptor. Fields
belong together by name. What differs is said where the pair is declared: other names (`renamed`), dataclass fields that
the message lacks (`here`), message fields that the dataclass lacks (`there`). Anything else that does not match up is a
TypeError when the pair is declared, at import, so that a field added on one side is never lost in silence.

| dataclass | message |
| --- | --- |
| int, float, str, bool, bytes, and NewTypes of them | the same |
| Enum | enum, by name behind its prefix (an Enumeration says what an unknown number stands for); or string, by value |
| X or None | a field with presence; without it, None is 0 or "" |
| a dataclass | a message, by its Translation, or one derived on the spot |
| tuple[X, ...], list[X], frozenset[X] | repeated X |
| tuple[A, B] | a message of just these fields, in their order |

Must not: know any one pair, or do I/O.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from operator import attrgetter
from typing import Any, Generic, NewType, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

T = TypeVar("T")
M = TypeVar("M", bound=Message)
E = TypeVar("E", bound=Enum)

_SCALARS: dict[object, set[int]] = {
    int: {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    },
    float: {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT},
    bool: {FieldDescriptor.CPPTYPE_BOOL},
    str: {FieldDescriptor.CPPTYPE_STRING},
    bytes: {FieldDescriptor.CPPTYPE_STRING},
}
_COLLECTIONS: dict[object, Callable[[Iterable[Any]], Any]] = {tuple: tuple, list: list, frozenset: frozenset}

_Convert = Callable[[Any], Any]


class _EnumType(Protocol):
    """The generated wrapper of an enum."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor: ...


class Enumeration(Generic[E]):
    """An Enum and a protobuf enum, member by member: KvTier.HOST is KV_TIER_HOST."""

    def __init__(self, kind: type[E], enum: _EnumType, *, unknown: E, here: Iterable[E] = ()) -> None:
        """`unknown`: what 0 and numbers of later versions stand for. `here`: members that the other side lacks.

        Raises TypeError where the members do not match up.
        """
        self.kind = kind
        self.descriptor = enum.DESCRIPTOR
        prefix = self.descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
        theirs = {value.name.removeprefix(prefix): value.number for value in self.descriptor.values if value.number}
        ours = {member.name: member for member in kind if member not in set(here)}
        if odd := sorted(theirs.keys() ^ ours.keys()):
            raise TypeError(f"{kind.__name__} and {self.descriptor.full_name}: only one of them has {', '.join(odd)}")
        numbers = {member: theirs[name] for name, member in ours.items()}
        members = _OrElse({number: member for member, number in numbers.items()}, unknown)
        self.encode: Callable[[E], int] = numbers.__getitem__
        self.decode: Callable[[int], E] = members.__getitem__


class _OrElse(dict[int, Any]):
    """A dict that answers one value for every key it lacks, and none of it in Python for those it has."""

    def __init__(self, known: dict[int, Any], otherwise: object) -> None:
        super().__init__(known)
        self._otherwise = otherwise

    def __missing__(self, key: int) -> object:
        return self._otherwise


class Translation(Generic[T, M]):
    """A dataclass and a message."""

    def __init__(
        self,
        kind: type[T],
        message: type[M],
        *,
        renamed: Mapping[str, str] = types.MappingProxyType({}),
        here: Iterable[str] = (),
        there: Iterable[str] | None = (),
        using: Iterable[Translation[Any, Any] | Enumeration[Any]] = (),
    ) -> None:
        """`renamed`: message names by dataclass name. `there`: None where the dataclass is one part of the message
        (see `check_parts`). `using`: how the types among the fields cross.

        Raises TypeError, naming the field, where the two do not match up.
        """
        self.kind = kind
        self.message = message
        self.descriptor = cast(Descriptor, message.DESCRIPTOR)
        pairs = self._paired(renamed, frozenset(here), None if there is None else frozenset(there))
        self.message_fields = frozenset(pairs.values())
        self._names = tuple(pairs.items())
        self._encoders: list[tuple[str, _Convert]] = []
        self._decoders: list[tuple[str, str | None, _Convert | None]] = []
        crossings = {(each.kind, each.descriptor.full_name): each for each in using}
        hints = _hints(kind, pairs)
        for ours, theirs in pairs.items():
            field = self.descriptor.fields_by_name[theirs]
            try:
                encode, decode, presence = _crossing(hints[ours], field, crossings)
            except TypeError as error:
                raise TypeError(f"{kind.__name__}.{ours} and {field.full_name}: {error}") from None
            if encode is not None:
                self._encoders.append((theirs, encode))
            if presence or decode is not None:
                self._decoders.append((ours, theirs if presence else None, decode))

    def _paired(self, renamed: Mapping[str, str], here: frozenset[str], there: frozenset[str] | None) -> dict[str, str]:
        """Message names by dataclass name."""
        name, full_name = self.kind.__name__, self.descriptor.full_name
        ours = [field.name for field in dataclasses.fields(self.kind)]  # type: ignore[arg-type]  # T is a dataclass
        theirs = list(self.descriptor.fields_by_name)

        def refuse(fields: Iterable[str], lack: str) -> None:
            if named := ", ".join(sorted(fields)):
                raise TypeError(f"{name} and {full_name}: {lack}".format(named))

        refuse((here | renamed.keys()) - set(ours), "the first has no {}")
        refuse(((there or frozenset()) | set(renamed.values())) - set(theirs), "the second has no {}")
        pairs = {each: renamed.get(each, each) for each in ours if each not in here}
        taken = list(pairs.values())
        refuse({each for each in taken if taken.count(each) > 1}, "two fields of the first are {}")
        refuse(set(pairs.values()) - set(theirs), "the second lacks {}: name it in `here`")
        if there is not None:
            refuse(set(theirs) - set(pairs.values()) - there, "the first lacks {}: name it in `there`")
            refuse(set(pairs.values()) & there, "both have {}, named in `there`")
        return pairs

    def encode(self, value: T, **beside: Any) -> M:
        """The message; `beside` are fields that only it has."""
        fields = {theirs: getattr(value, ours) for ours, theirs in self._names}
        for name, encode in self._encoders:
            fields[name] = encode(fields[name])
        fields.update(beside)
        return self.message(**fields)

    def decode(self, message: M, **given: Any) -> T:
        """The value; `given` are fields that only it has, and those that are to be other than the message says."""
        fields = {ours: getattr(message, theirs) for ours, theirs in self._names}
        for name, presence, decode in self._decoders:
            if presence is not None and not message.HasField(presence):
                fields[name] = None
            elif decode is not None:
                fields[name] = decode(fields[name])
        fields.update(given)
        return self.kind(**fields)


def check_parts(message: type[Message], parts: Iterable[Translation[Any, Any]], *, there: Iterable[str] = ()) -> None:
    """Raise TypeError where several dataclasses together do not make up a message: each field once, none left out."""
    descriptor = cast(Descriptor, message.DESCRIPTOR)
    named = [name for part in parts for name in part.message_fields] + list(there)
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise TypeError(f"{descriptor.full_name}: {', '.join(twice)} is in several parts")
    if odd := sorted(set(descriptor.fields_by_name) ^ set(named)):
        raise TypeError(f"{descriptor.full_name}: {', '.join(odd)} is in no part")


class OneOf(Generic[T, M]):
    """The members of a union of dataclasses and those of a message's oneof, told apart by their types."""

    def __init__(
        self, message: type[M], oneof: str, members: Iterable[Translation[Any, Any]], *, there: Iterable[str] = ()
    ) -> None:
        """`there`: members of the oneof that stand for none of the dataclasses.

        Raises TypeError where the members do not match up.
        """
        self._message = message
        self._oneof = oneof
        descriptor = cast(Descriptor, message.DESCRIPTOR)
        full_name = f"{descriptor.full_name}.{oneof}"
        names: dict[str, str] = {}
        for field in descriptor.oneofs_by_name[oneof].fields:
            if field.name not in set(there):
                assert field.message_type is not None, f"{field.full_name} is no message"
                names[field.message_type.full_name] = field.name
        self._by_kind: dict[type, tuple[str, Translation[Any, Any]]] = {}
        for member in members:
            if (name := names.pop(member.descriptor.full_name, None)) is None:
                raise TypeError(f"{full_name}: no member left for {member.kind.__name__}")
            self._by_kind[member.kind] = (name, member)
        if names:
            raise TypeError(f"{full_name}: nothing stands for {', '.join(sorted(names.values()))}: name it in `there`")
        self._by_name = dict(self._by_kind.values())

    def name(self, kind: type) -> str:
        """Of the oneof's member that stands for the dataclass."""
        return self._by_kind[kind][0]

    def encode(self, value: T, **beside: Any) -> M:
        """The message with the member that stands for `value`; `beside` are fields outside the oneof."""
        name, mapping = self._by_kind[type(value)]
        return self._message(**{name: mapping.encode(value)}, **beside)

    def decode(self, message: M, **given: Any) -> T | None:
        """The member's value, with `given` as in Translation.decode; None where it is unset or stands for none."""
        name = message.WhichOneof(self._oneof)
        if name is None or name not in self._by_name:
            return None
        value: T = self._by_name[name].decode(getattr(message, name), **given)
        return value


# One field


def _crossing(
    hint: Any, field: FieldDescriptor, crossings: dict[tuple[type, str], Translation[Any, Any] | Enumeration[Any]]
) -> tuple[_Convert | None, _Convert | None, bool]:
    """How a field is encoded and decoded (None: as it is), and whether it is None where the message lacks it."""
    hint = _plain(hint)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        if len(inner) != 1 or field.is_repeated:
            raise TypeError(f"{hint} does not cross: only X or None does")
        encode, decode = _value(_plain(inner[0]), field, crossings)
        if field.has_presence:
            return _unless_none(encode), decode, True
        return _unless_none(encode), _unless_zero(decode), False
    if origin in _COLLECTIONS and not (origin is tuple and get_args(hint)[-1] is not Ellipsis):
        if not field.is_repeated:
            raise TypeError(f"{hint} on one side, a single value on the other")
        return *_several(_COLLECTIONS[origin], *_value(_plain(get_args(hint)[0]), field, crossings)), False
    if field.is_repeated:
        raise TypeError(f"{hint} on one side, repeated on the other")
    return *_value(hint, field, crossings), False


def _value(
    hint: Any, field: FieldDescriptor, crossings: dict[tuple[type, str], Translation[Any, Any] | Enumeration[Any]]
) -> tuple[_Convert | None, _Convert | None]:
    """How one value of a field is encoded and decoded; None: as it is."""
    if field.cpp_type in _SCALARS.get(hint, ()) and (hint is bytes) == (field.type == FieldDescriptor.TYPE_BYTES):
        return None, None
    described = field.message_type or field.enum_type
    if described is not None and (known := crossings.get((hint, described.full_name))) is not None:
        return known.encode, known.decode
    if isinstance(hint, type) and issubclass(hint, Enum):
        if field.enum_type is not None:
            raise TypeError("an enum needs an Enumeration in `using`")
        if field.type == FieldDescriptor.TYPE_STRING:
            return attrgetter("value"), hint
    if field.message_type is not None:
        if get_origin(hint) is tuple:
            return _positional(get_args(hint), field.message_type, crossings)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            derived = Translation(hint, GetMessageClass(field.message_type), using=crossings.values())
            return derived.encode, derived.decode
    raise TypeError(f"{getattr(hint, '__name__', hint)} on one side, another type on the other")


def _positional(
    hints: tuple[Any, ...], message: Descriptor, crossings: dict[tuple[type, str], Any]
) -> tuple[_Convert, _Convert]:
    fields = sorted(message.fields, key=lambda field: field.number)
    ways = [_crossing(hint, field, crossings) for hint, field in zip(hints, fields, strict=False)]
    if len(fields) != len(hints) or any(way != (None, None, False) for way in ways):
        raise TypeError(f"{message.full_name} is not just {len(hints)} plain values")
    names = tuple(field.name for field in fields)
    made = GetMessageClass(message)
    return (lambda values: made(**dict(zip(names, values, strict=True)))), attrgetter(*names)


def _several(
    collect: Callable[[Iterable[Any]], Any], encode: _Convert | None, decode: _Convert | None
) -> tuple[_Convert | None, _Convert]:
    encoded: _Convert | None = None if encode is None else lambda values: [encode(value) for value in values]
    if collect is frozenset:
        inner = encoded or list
        encoded = lambda values: sorted(inner(values))  # noqa: E731 - the same bytes every time
    return encoded, collect if decode is None else lambda values: collect(decode(value) for value in values)


def _unless_none(encode: _Convert | None) -> _Convert | None:
    # A message's constructor takes None for a field that is not given.
    return None if encode is None else lambda value: None if value is None else encode(value)


def _unless_zero(decode: _Convert | None) -> _Convert:
    return lambda value: None if not value else value if decode is None else decode(value)


def _plain(hint: Any) -> Any:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    return hint


def _hints(kind: type, names: Iterable[str]) -> dict[str, Any]:
    """Type hints of these fields only: those that do not cross may name what is imported for type checkers alone."""
    wanted = set(names)
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        told = {name: hint for name, hint in inspect.get_annotations(base).items() if name in wanted}
        holder = types.SimpleNamespace(__annotations__=told)
        hints |= get_type_hints(holder, globalns=vars(sys.modules[base.__module__]))
    return hints
