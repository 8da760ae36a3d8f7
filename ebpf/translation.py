"""A ring-buffer record as an event, field by field, paired by their names.

Owns the pairing, checked when it is made: a field that one of them lacks is a TypeError that names it, so nothing is
left out in silence. Must not: know any one pair (reader.py does).

| event | record |
| --- | --- |
| int | an integer |
| bool | an integer: 0, or something else |
| str | char[N], up to its zero; __u8[16]: an address |
| X or None | X; None where it is 0 or empty |
"""

from __future__ import annotations

import ctypes
import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Address
from operator import attrgetter
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

from .abi import Record, Role

HEADER = {
    "at_ns": "time_ns", "id": "tag", "agent": "agent_tag", "sandbox": "sandbox_id", "pid": "tgid", "is_agent": "role",
}  # fmt: skip
"""What events call the fields of the header that they have."""
ADDRESS_BYTES = 16

_Convert = Callable[[Any], Any]


class Translation:
    """How the records of one kind become events of one class."""

    def __init__(
        self,
        kind: type,
        record: type[Record],
        *,
        renamed: Mapping[str, str] = types.MappingProxyType({}),
        given: Mapping[str, Callable[[Any], Any]] = types.MappingProxyType({}),
        here: Iterable[str] = (),
        whole: bool = True,
    ) -> None:
        """`renamed`: the record's names by the event's. `given`: event fields that are worked out from the record.
        `here`: those that keep their default. `whole`: False where the event leaves out fields of the record.

        Raises TypeError, naming the field, where the two do not match up.
        """
        self.kind = kind
        self.record = record
        own = {name: field for name, field, *_ in record._fields_ if name != "header"}
        paired = [field.name for field in dataclasses.fields(kind) if field.name not in {*given, *here}]
        in_header = {name: f"header.{theirs}" for name, theirs in HEADER.items()}
        paths = {name: renamed.get(name) or (name if name in own else in_header.get(name, name)) for name in paired}
        if lacking := sorted(set(paths.values()) - own.keys() - set(in_header.values())):
            raise TypeError(f"{kind.__name__} and {record.__name__}: the second has no {', '.join(lacking)}")
        padding = {name for name in own if name.startswith(("padding", "reserved"))}
        if whole and (left_out := sorted(own.keys() - set(paths.values()) - padding)):
            raise TypeError(f"{kind.__name__} and {record.__name__}: the first has no {', '.join(left_out)}")
        self.of_agents = "is_agent" in paths
        """Whether it is told of an agent's own processes as well as of tool calls."""
        hints = get_type_hints(kind)
        self._given = dict(given)
        self._names = tuple(paths)
        self._read = attrgetter(*paths.values())
        self._converts: list[tuple[int, _Convert]] = []
        for at, (name, path) in enumerate(paths.items()):
            try:
                convert = _is_agent if name == "is_agent" else _crossing(hints[name], _type_at(record, path))
            except TypeError as error:
                raise TypeError(f"{kind.__name__}.{name} and {record.__name__}.{path}: {error}") from None
            if convert is not None:
                self._converts.append((at, convert))

    def decode(self, record: Record) -> Any:
        """The event."""
        values = list(self._read(record))
        for at, convert in self._converts:
            values[at] = convert(values[at])
        fields = dict(zip(self._names, values))  # noqa: B905 - as long as each other; `strict` costs a tenth
        for name, work_out in self._given.items():
            fields[name] = work_out(record)
        return self.kind(**fields)


def address_text(packed: bytes) -> str:
    """16 bytes as people write them: an IPv4 address in dotted form, also where a socket of both families holds it."""
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _type_at(record: type[Record], path: str) -> Any:
    found: Any = record
    for name in path.split("."):
        found = {each: kind for each, kind, *_ in found._fields_}[name]
    return found


def _crossing(hint: Any, field: Any) -> _Convert | None:
    """How a field's value becomes one of `hint`; None: as it is."""
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    if get_origin(hint) in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{hint} does not cross: only X or None does")
        convert = _crossing(inner[0], field)
        return lambda value: (value if convert is None else convert(value)) or None
    is_array = issubclass(field, ctypes.Array)
    if hint is str and is_array and field._type_ is ctypes.c_char:
        return lambda value: value.decode(errors="replace")
    if hint is str and is_array and field._type_ is ctypes.c_uint8 and field._length_ == ADDRESS_BYTES:
        return lambda value: address_text(bytes(value))
    if hint in (int, bool) and issubclass(field, ctypes._SimpleCData):
        return bool if hint is bool else None
    raise TypeError(f"{getattr(hint, '__name__', hint)} on one side, {field.__name__} on the other")


def _is_agent(role: int) -> bool:
    return role == Role.AGENT
