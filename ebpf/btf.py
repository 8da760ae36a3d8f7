"""A reader of an object's .BTF section, enough to lay out its structs: Documentation/bpf/btf.rst describes the format.

Owns the parsing. Must not: know any one of our structs. BTF as clang writes it, of a 64-bit little-endian object.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

KINDS = {1: "int", 2: "ptr", 3: "array", 4: "struct", 5: "union", 6: "enum", 8: "typedef", 9: "volatile", 10: "const"}
EXTRA_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}  # int, array, var, decl_tag
PER_MEMBER_BYTES = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}  # struct, union, enum, func_proto, datasec, enum64
_INT_SIGNED, _INT_CHAR = 1, 2


@dataclass(frozen=True, slots=True)
class Type:
    kind: int
    name: str
    size_or_type: int
    members: tuple[tuple[str, int, int], ...] = ()
    """Of a struct or union: name, type id, offset in bits. Of an enum: name, value, 0."""
    array: tuple[int, int] = (0, 0)
    """Element type id and count."""
    encoding: int = 0
    """Of an int: a set of _INT_*."""


class Btf:
    """The types of one object. Every lookup raises LookupError, naming what is not there."""

    def __init__(self, elf: Path) -> None:
        """Raises OSError, and LookupError where the file is no object with BTF."""
        try:
            self._parse(_section(elf.read_bytes(), b".BTF"))
        except (struct.error, IndexError, ValueError) as error:
            raise LookupError(f"{elf} is no object with BTF: {error}") from error

    def _parse(self, data: bytes) -> None:
        _, _, _, header, type_at, type_bytes, text_at, text_bytes = struct.unpack_from("<HBBIIIII", data)
        text = data[header + text_at : header + text_at + text_bytes]

        def name(at: int) -> str:
            return text[at : text.index(b"\0", at)].decode()

        self.types: list[Type] = [Type(0, "void", 0)]
        at, end = header + type_at, header + type_at + type_bytes
        while at < end:
            name_at, info, size = struct.unpack_from("<III", data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            at += 12
            members: tuple[tuple[str, int, int], ...] = ()
            array, encoding = (0, 0), 0
            if kind in (4, 5):
                rows = [struct.unpack_from("<III", data, at + 12 * i) for i in range(count)]
                members = tuple((name(row[0]), row[1], row[2]) for row in rows)
            elif kind == 6:
                pairs = [struct.unpack_from("<Ii", data, at + 8 * i) for i in range(count)]
                members = tuple((name(pair[0]), pair[1], 0) for pair in pairs)
            elif kind == 3:
                element, _, length = struct.unpack_from("<III", data, at)
                array = (element, length)
            elif kind == 1:
                encoding = struct.unpack_from("<I", data, at)[0] >> 24 & 0xF
            at += EXTRA_BYTES.get(kind, 0) + PER_MEMBER_BYTES.get(kind, 0) * count
            self.types.append(Type(kind, name(name_at), size, members, array, encoding))

    def find(self, kind: str, name: str) -> Type:
        found = next((t for t in self.types if t.name == name and KINDS.get(t.kind) == kind), None)
        if found is None:
            raise LookupError(f"{kind} {name} is not in the object's BTF")
        return found

    def plain(self, type_id: int) -> Type:
        """The type behind typedefs and qualifiers."""
        found = self.types[type_id]
        while KINDS.get(found.kind) in ("typedef", "const", "volatile"):
            found = self.types[found.size_or_type]
        return found


def is_signed(kind: Type) -> bool:
    """Of an int."""
    return bool(kind.encoding & _INT_SIGNED)


def is_char(kind: Type) -> bool:
    """Of an int: plain `char`, which clang calls so by name where it marks no encoding."""
    return bool(kind.encoding & _INT_CHAR) or kind.name == "char"


def _section(elf: bytes, wanted: bytes) -> bytes:
    """A section of a 64-bit little-endian ELF file. Raises LookupError."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes) for i in range(count)]
    names = elf[rows[names_index][4] : rows[names_index][4] + rows[names_index][5]]
    for row in rows:
        if names[row[0] : names.index(b"\0", row[0])] == wanted:
            return elf[row[4] : row[4] + row[5]]
    raise LookupError(f"no section {wanted.decode()}")
