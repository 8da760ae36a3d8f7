"""What records from the ring become."""

from __future__ import annotations

import ctypes

import pytest
from equipoise.ebpf.abi import Layouts
from equipoise.ebpf.reader import command_of
from equipoise.ebpf.translation import address_text


@pytest.fixture(scope="module")
def exec_record(object_file):
    return Layouts(object_file).struct("exec_event")


@pytest.fixture
def exec_event(exec_record):
    def make(argv: bytes, total: int | None = None, filename: bytes = b"/usr/bin/pytest"):
        event = exec_record(filename=filename, argv_bytes=len(argv), argv_total_bytes=total or len(argv))
        ctypes.memmove(ctypes.addressof(event) + exec_record.argv.offset, argv, len(argv))
        return event

    return make


def test_arguments_are_joined_by_blanks(exec_event):
    assert command_of(exec_event(b"pytest\0-q\0tests/a b\0")) == "pytest -q tests/a b"


def test_an_empty_argument_in_the_middle_does_not_end_the_command(exec_event):
    assert command_of(exec_event(b"printf\0\0x\0")) == "printf  x"


def test_a_command_line_cut_by_the_kernels_buffer_says_so(exec_event, exec_record):
    argv = b"cc\0" + b"a" * (exec_record.argv.size - 3)
    assert command_of(exec_event(argv, total=9000)).endswith("aaa…")


def test_without_arguments_the_file_names_the_command(exec_event):
    assert command_of(exec_event(b"")) == "/usr/bin/pytest"


def test_bytes_that_are_not_text_are_replaced(exec_event):
    assert command_of(exec_event(b"cat\0\xff\xfe\0")) == "cat \ufffd\ufffd"


def test_an_address_is_written_as_people_write_it():
    assert address_text(bytes(15) + b"\1") == "::1"
    assert address_text(bytes(10) + b"\xff\xff\x0a\0\0\2") == "10.0.0.2"
