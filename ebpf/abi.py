"""The ABI of src/events.h as Python sees it: the layouts of the compiled object, read from its BTF.

Owns how a C struct becomes a ctypes one, the check that both lie in memory alike, and the few numbers that our code
names (ABI_VERSION, roles, flags), held against the object's. No layout is written down a second time: an object brings
its own. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

from .btf import KINDS, Btf, Type, is_char, is_signed
from .errors import AbiMismatch

ABI_VERSION = 3


class Role(IntEnum):
    AGENT = 1
    TOOL = 2


class ToolFlag(IntFlag):
    OWN_MEMCG = 1
    STARTING = 2


Record = ctypes.Structure
"""A struct of the object. Its fields are C's; reading or writing one that it lacks raises AttributeError."""
_INTS = {
    (1, False): ctypes.c_uint8, (2, False): ctypes.c_uint16, (4, False): ctypes.c_uint32, (8, False): ctypes.c_uint64,
    (1, True): ctypes.c_int8, (2, True): ctypes.c_int16, (4, True): ctypes.c_int32, (8, True): ctypes.c_int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EventKind:
    """One kind of ring-buffer event."""

    number: int
    name: str
    """As in enum event_kind, without EVENT_: "TOOL_EXIT"."""
    record: type[Record]


class Layouts:
    """The structs and enums of one object."""

    def __init__(self, path: Path) -> None:
        """Raises AbiMismatch: no BTF, a struct that Python would lay out otherwise, other roles or flags than ours."""
        self.path = path
        try:
            self._btf = Btf(path)
        except (OSError, LookupError) as error:
            raise AbiMismatch(path, str(error)) from error
        self._made: dict[str, type[Record]] = {}
        for ours, prefix in ((Role, "ROLE_"), (ToolFlag, "TOOL_")):
            name = {Role: "role", ToolFlag: "tool_flag"}[ours]
            theirs = self.numbers(name, prefix)
            if theirs != {member.name: int(member) for member in ours}:
                raise AbiMismatch(path, f"enum {name} is {theirs}, not {[*ours]}")
        self.event_kinds = self._event_kinds()

    def struct(self, name: str) -> type[Record]:
        """The ctypes class of `struct name`; raises AbiMismatch."""
        if name not in self._made:
            try:
                self._made[name] = self._make(self._btf.find("struct", name))
            except LookupError as error:
                raise AbiMismatch(self.path, str(error)) from error
        return self._made[name]

    def numbers(self, name: str, prefix: str) -> dict[str, int]:
        """The members of `enum name` without their common prefix; those that only count (X_COUNT) are left out."""
        try:
            members = self._btf.find("enum", name).members
        except LookupError as error:
            raise AbiMismatch(self.path, str(error)) from error
        return {each.removeprefix(prefix): number for each, number, _ in members if not each.endswith("_COUNT")}

    def _event_kinds(self) -> tuple[EventKind, ...]:
        """Every kind with its record: the member of `union event` that is called like it."""
        try:
            members = self._btf.find("union", "event").members
        except LookupError as error:
            raise AbiMismatch(self.path, str(error)) from error
        records = {name: self.struct(self._btf.plain(type_id).name) for name, type_id, _ in members}
        kinds = self.numbers("event_kind", "EVENT_")
        if odd := {name.lower() for name in kinds} ^ records.keys():
            raise AbiMismatch(self.path, f"only one of enum event_kind and union event has {', '.join(sorted(odd))}")
        return tuple(EventKind(number, name, records[name.lower()]) for name, number in kinds.items())

    def _make(self, layout: Type) -> type[Record]:
        fields = [(name, self._field(type_id)) for name, type_id, _ in layout.members]
        # __slots__: else an assignment to a field that is not there would go to the object's own dictionary.
        made = type(layout.name, (ctypes.Structure,), {"__slots__": (), "_fields_": fields})
        for name, _, bits in layout.members:
            at = getattr(made, name).offset
            if at * 8 != bits:
                raise AbiMismatch(self.path, f"{layout.name}.{name} is at byte {bits // 8}, not {at}")
        if ctypes.sizeof(made) != layout.size_or_type:
            raise AbiMismatch(self.path, f"{layout.name} has {layout.size_or_type} bytes, not {ctypes.sizeof(made)}")
        return made

    def _field(self, type_id: int) -> Any:
        found = self._btf.plain(type_id)
        match KINDS.get(found.kind):
            case "struct":
                return self.struct(found.name)
            case "array":
                element, count = found.array
                inner = self._btf.plain(element)
                return (ctypes.c_char if is_char(inner) else self._field(element)) * count
            case "int" if (width := _INTS.get((found.size_or_type, is_signed(found)))) is not None:
                return width
        raise AbiMismatch(self.path, f"{found.name or KINDS.get(found.kind)}: not a type of the ABI")
