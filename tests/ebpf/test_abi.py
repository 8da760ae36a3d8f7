"""events.h, as written, against the layouts that user space reads from the compiled object."""

from __future__ import annotations

import ctypes
import re
import shutil

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.abi import ABI_VERSION, Layouts
from equipoise.ebpf.errors import AbiMismatch

SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s64": 8, "char": 1}


@pytest.fixture(scope="module")
def header():
    text = re.sub(r"/\*.*?\*/", "", (build.SOURCES / "events.h").read_text(), flags=re.DOTALL)
    # The one constant of array lengths that is an enum's and no #define.
    counts = dict(re.findall(r"(\w+_COUNT) = (\d+)", text))
    defined = dict(re.findall(r"#define (\w+) (\d+)", text))
    for name, number in {**counts, **defined}.items():
        text = re.sub(rf"\[{name}\]", f"[{number}]", text)
    return text


@pytest.fixture(scope="module")
def layouts(object_file):
    return Layouts(object_file)


def structs_in(text: str) -> dict[str, list[tuple[str, str, int]]]:
    """Of each struct: the fields' types, names and array lengths (0: no array)."""
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\t(?:struct )?(\w+) (\w+)(?:\[(\d+)\])?;", body, re.MULTILINE)
        assert len(rows) == body.count(";"), f"{name}: a field the test cannot read"
        found[name] = [(kind.removeprefix("__"), field, int(count or 0)) for kind, field, count in rows]
    return found


def test_every_struct_of_the_header_has_its_fields_offsets_and_sizes(header, layouts):
    structs = structs_in(header)
    assert len(structs) > 10
    bytes_of = dict(SIZES)
    for name, fields in structs.items():
        expected, at = [], 0
        for kind, field, count in fields:
            expected.append((field, at, bytes_of[kind] * (count or 1)))
            at += expected[-1][2]
        made = layouts.struct(name)
        assert [(f, getattr(made, f).offset, getattr(made, f).size) for f, *_ in made._fields_] == expected
        assert ctypes.sizeof(made) == at
        bytes_of[name] = at


def test_signed_fields_are_signed_and_text_is_text(header, layouts):
    for name, fields in structs_in(header).items():
        types = {field: kind for field, kind, *_ in layouts.struct(name)._fields_}
        for kind, field, count in fields:
            element = types[field]._type_ if count else types[field]
            if kind in SIZES:
                assert (element is ctypes.c_int64) == (kind == "s64"), f"{name}.{field}"
                assert (element is ctypes.c_char) == (kind == "char"), f"{name}.{field}"


@pytest.mark.parametrize(
    ("name", "prefix"), [("event_kind", "EVENT_"), ("untracked_reason", "UNTRACKED_"), ("role", "ROLE_")]
)
def test_every_enum_has_the_headers_names_and_numbers(header, layouts, name, prefix):
    (body,) = re.findall(rf"^enum {name} \{{(.*?)^\}};", header, re.MULTILINE | re.DOTALL)
    members = {each: int(number) for each, number in re.findall(rf"{prefix}(\w+) = (\d+)", body)}
    counted = members.pop("KIND_COUNT", members.pop("REASON_COUNT", None))
    assert layouts.numbers(name, prefix) == members
    assert counted in (None, max(members.values()) + 1)


def test_the_object_and_python_have_one_abi_version(header):
    assert re.findall(r"#define ABI_VERSION (\d+)", header) == [str(ABI_VERSION)]


def test_every_size_is_asserted_in_the_header_too(header):
    assert set(structs_in(header)) == set(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\)", header))


def test_every_event_begins_with_the_header_and_that_with_its_kind(layouts):
    header = layouts.struct("event_header")
    assert (header._fields_[0], header.kind.offset) == (("kind", ctypes.c_uint32), 0)
    assert {kind.record._fields_[0] for kind in layouts.event_kinds} == {("header", header)}


def test_a_field_that_a_record_lacks_can_neither_be_read_nor_written(layouts):
    record = layouts.struct("tool_record")()
    with pytest.raises(AttributeError, match="no_such_bytes"):
        _ = record.no_such_bytes
    with pytest.raises(AttributeError, match="no_such_bytes"):
        record.no_such_bytes = 1


@pytest.fixture
def changed(object_file, tmp_path, monkeypatch):
    """Compiles the sources with texts of events.h replaced by others."""

    def compile_with(*replaced: tuple[str, str]) -> Layouts:
        sources = tmp_path / "src"
        shutil.copytree(build.SOURCES, sources)
        text = (sources / "events.h").read_text()
        for before, after in replaced:
            assert before in text
            text = text.replace(before, after)
        (sources / "events.h").write_text(text)
        monkeypatch.setattr(build, "SOURCES", sources)
        monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
        return Layouts(build.compile_unit("equipoise"))

    return compile_with


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("EVENT_CONNECTION = 8,", "EVENT_CONNECTION = 8, EVENT_NEW_THING = 20,", "only one of .* has new_thing"),
        ("ROLE_TOOL = 2,", "ROLE_TOOL = 2, ROLE_NEW = 3,", "enum role"),
        ("TOOL_STARTING = 2,", "TOOL_STARTING = 4,", "enum tool_flag"),
    ],
)
def test_an_object_that_user_space_would_misread_is_refused_with_the_remedy(changed, before, after, said):
    with pytest.raises(AbiMismatch, match=rf"{said}.*make ebpf"):
        changed((before, after))


def test_a_field_more_is_read_from_the_object_without_a_change_on_our_side(changed, layouts):
    grown = changed(
        ("\t__u32 processes;\n\t__u32 enforced;", "\t__s64 swap_bytes;\n\t__u32 processes;\n\t__u32 enforced;"),
        ("sizeof(struct memory_event) == 128", "sizeof(struct memory_event) == 136"),
    )
    record = grown.struct("memory_event")(swap_bytes=-5, enforced=1)
    assert (record.swap_bytes, record.enforced) == (-5, 1)
    assert ctypes.sizeof(record) == ctypes.sizeof(layouts.struct("memory_event")) + 8
