"""events.h, as compiled, against its Python mirror."""

from __future__ import annotations

import ctypes
import re

import pytest
from equipoise.ebpf import abi, build
from equipoise.tests.ebpf.btf import Btf


@pytest.fixture(scope="module")
def compiled(object_file):
    return Btf(object_file)


@pytest.mark.parametrize(("name", "mirror"), abi.MIRRORED.items())
def test_every_struct_has_the_same_fields_offsets_and_sizes(compiled, name, mirror):
    theirs = compiled.find("struct", name)
    assert theirs.size_or_type == ctypes.sizeof(mirror)
    in_c = [(field, bits // 8, compiled.size_bytes(type_id)) for field, type_id, bits in theirs.members]
    in_python = [(field, getattr(mirror, field).offset, getattr(mirror, field).size) for field, *_ in mirror._fields_]
    assert in_python == in_c


@pytest.mark.parametrize(("name", "mirror"), abi.MIRRORED.items())
def test_signed_fields_are_signed_on_both_sides(compiled, name, mirror):
    signed = {field for field, type_id, _ in compiled.find("struct", name).members if compiled.is_signed(type_id)}
    assert signed == {field for field, kind, *_ in mirror._fields_ if kind is ctypes.c_int64}


@pytest.mark.parametrize(
    ("name", "prefix", "mirror", "count"),
    [
        ("event_kind", "EVENT_", abi.EventKind, abi.EVENT_KIND_COUNT),
        ("untracked_reason", "UNTRACKED_", abi.UntrackedReason, abi.UNTRACKED_REASON_COUNT),
        ("role", "ROLE_", abi.Role, None),
    ],
)
def test_every_enum_has_the_same_names_and_numbers(compiled, name, prefix, mirror, count):
    in_c = {member.removeprefix(prefix): value for member, value, _ in compiled.find("enum", name).members}
    for last in ("KIND_COUNT", "REASON_COUNT"):
        assert in_c.pop(last, count) == count
    assert in_c == {member.name: member.value for member in mirror}


@pytest.mark.parametrize(
    "name",
    ["ABI_VERSION", "COMM_BYTES", "FILENAME_BYTES", "ARGV_BYTES", "ADDRESS_BYTES", "TOOL_OWN_MEMCG", "TOOL_STARTING"],
)
def test_every_constant_has_the_same_value(name):
    header = (build.SOURCES / "events.h").read_text()
    value = re.search(rf"#define {name} (\d+)u?\b", header)
    assert value is not None
    assert int(value[1]) == getattr(abi, name)


def test_every_struct_of_the_header_is_mirrored_and_its_size_asserted():
    header = (build.SOURCES / "events.h").read_text()
    structs = set(re.findall(r"^struct (\w+) \{", header, re.MULTILINE))
    assert structs == set(abi.MIRRORED)
    assert structs == set(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\)", header))
