"""Records and events are paired by their fields' names; what does not match is named."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import get_args

import pytest
from equipoise.ebpf import reader
from equipoise.ebpf.abi import EventKind, Layouts, Role
from equipoise.ebpf.errors import AbiMismatch
from equipoise.ebpf.translation import Translation
from equipoise.policies.events import Event
from equipoise.policies.model import ToolCallId


@pytest.fixture(scope="module")
def layouts(object_file):
    return Layouts(object_file)


@pytest.fixture(scope="module")
def record_with(layouts):
    def make(*fields: tuple[str, object]) -> type[ctypes.Structure]:
        return type(
            "a_record", (ctypes.Structure,), {"_fields_": [("header", layouts.struct("event_header")), *fields]}
        )

    return make


@dataclass(frozen=True, slots=True)
class Bitten:
    at_ns: int
    id: ToolCallId
    pid: int
    is_agent: bool
    by: str
    depth_bytes: int
    bled: bool
    again_ns: int | None = None


FIELDS = [
    ("again_ns", ctypes.c_uint64),
    ("depth_bytes", ctypes.c_uint64),
    ("bled", ctypes.c_uint32),
    ("padding", ctypes.c_uint32),
    ("by", ctypes.c_char * 8),
]


def test_fields_are_taken_by_their_names_wherever_they_stand(record_with, layouts):
    record = record_with(*FIELDS)
    header = layouts.struct("event_header")(time_ns=7, tag=8, tgid=9, role=Role.AGENT)
    event = Translation(Bitten, record).decode(record(header=header, depth_bytes=2, bled=3, by=b"fox"))
    assert event == Bitten(7, ToolCallId(8), 9, True, "fox", 2, True, None)


def test_a_value_worked_out_or_renamed_takes_the_fields_place(record_with):
    record = record_with(("depth", ctypes.c_uint64), *FIELDS)
    by = {"by": lambda each: f"{each.depth}"}
    pair = Translation(Bitten, record, renamed={"depth_bytes": "depth"}, given=by, whole=False)
    event = pair.decode(record(depth=5, depth_bytes=1))
    assert (event.depth_bytes, event.by, event.is_agent) == (5, "5", False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (FIELDS[1:], "Bitten and a_record: the second has no again_ns"),
        ([*FIELDS, ("depth_pages", ctypes.c_uint64)], "Bitten and a_record: the first has no depth_pages"),
        ([*FIELDS[:4], ("by", ctypes.c_uint32)], "Bitten.by and a_record.by: str on one side, c_uint on the other"),
        (
            [("depth_bytes", ctypes.c_char * 8), FIELDS[0], *FIELDS[2:]],
            "Bitten.depth_bytes and a_record.depth_bytes: int on one side, c_char_Array_8 on the other",
        ),
    ],
)
def test_a_field_that_does_not_match_is_named(record_with, fields, said):
    with pytest.raises(TypeError, match=said):
        Translation(Bitten, record_with(*fields))


def test_every_kind_of_the_compiled_object_is_an_event(layouts):
    kinds = [each.kind for each in reader.translations(layouts, record_of=lambda slot: None)]
    assert len(kinds) == len(layouts.event_kinds)
    assert set(kinds) <= set(get_args(Event))


def test_a_kind_that_nothing_is_called_like_is_refused_at_load_with_both_names(layouts, monkeypatch):
    record = layouts.struct("exit_event")
    monkeypatch.setattr(layouts, "event_kinds", (EventKind(1, "DOG_BITTEN", record),))
    with pytest.raises(AbiMismatch, match=r"EVENT_DOG_BITTEN: policies/events.py has no DogBitten; .*make ebpf"):
        reader.translations(layouts, record_of=lambda slot: None)
