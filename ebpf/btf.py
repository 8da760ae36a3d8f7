"""A reader of the .BTF section, enough to list structs: Documentation/bpf/btf.rst describes the format."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

KINDS = {1: "int", 2: "ptr", 3: "array", 4: "struct", 5: "union", 6: "enum", 8: "typedef", 9: "volatile", 10: "const"}
EXTRA_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}  # int, array, var, decl_tag
PER_MEMBER_BYTES = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}  # struct, union, enum, func_proto, datasec, enum64


@dataclass(frozen=True, slots=True)
class Type:
    kind: int
    name: str
    size_or_type: int
    members: tuple[tuple[str, int, int], ...] = ()
    """Of a struct: name, type id, offset in bits. Of an enum: name, value, 0."""
    array: tuple[int, int] = (0, 0)
    """Element type id and count."""


class Btf:
    def __init__(self, elf: Path) -> None:
        data = _section(elf.read_bytes(), b".BTF")
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
            array = (0, 0)
            if kind in (4, 5):
                rows = [struct.unpack_from("<III", data, at + 12 * i) for i in range(count)]
                members = tuple((name(row[0]), row[1], row[2]) for row in rows)
            elif kind == 6:
                pairs = [struct.unpack_from("<Ii", data, at + 8 * i) for i in range(count)]
                members = tuple((name(pair[0]), pair[1], 0) for pair in pairs)
            elif kind == 3:
                element, _, length = struct.unpack_from("<III", data, at)
                array = (element, length)
            at += EXTRA_BYTES.get(kind, 0) + PER_MEMBER_BYTES.get(kind, 0) * count
            self.types.append(Type(kind, name(name_at), size, members, array))

    def find(self, kind: str, name: str) -> Type:
        found = [t for t in self.types if t.name == name and KINDS.get(t.kind) == kind]
        assert found, f"{kind} {name} is not in the object's BTF"
        return found[0]

    def size_bytes(self, type_id: int) -> int:
        t = self.types[type_id]
        match KINDS[t.kind]:
            case "ptr":
                return 8
            case "array":
                return t.array[1] * self.size_bytes(t.array[0])
            case "typedef" | "const" | "volatile":
                return self.size_bytes(t.size_or_type)
            case _:
                return t.size_or_type

    def is_signed(self, type_id: int) -> bool:
        t = self.types[type_id]
        return KINDS[t.kind] == "typedef" and (t.name.startswith("__s") or self.is_signed(t.size_or_type))


def _section(elf: bytes, wanted: bytes) -> bytes:
    """A section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes) for i in range(count)]
    names = elf[rows[names_index][4] : rows[names_index][4] + rows[names_index][5]]
    for row in rows:
        if names[row[0] : names.index(b"\0", row[0])] == wanted:
            return elf[row[4] : row[4] + row[5]]
    raise AssertionError(f"no section {wanted!r}")
