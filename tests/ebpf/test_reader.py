"""What records from the ring become."""

from __future__ import annotations

import ctypes

from equipoise.ebpf.abi import ARGV_BYTES, EventKind, ExecEvent
from equipoise.ebpf.reader import address_text, command_of


def exec_event(argv: bytes, total: int | None = None, filename: bytes = b"/usr/bin/pytest") -> ExecEvent:
    event = ExecEvent(filename=filename, argv_bytes=len(argv), argv_total_bytes=total or len(argv))
    event.header.kind = EventKind.TOOL_EXEC
    ctypes.memmove(ctypes.addressof(event) + ExecEvent.argv.offset, argv, len(argv))
    return event


def test_arguments_are_joined_by_blanks():
    assert command_of(exec_event(b"pytest\0-q\0tests/a b\0")) == "pytest -q tests/a b"


def test_an_empty_argument_in_the_middle_does_not_end_the_command():
    assert command_of(exec_event(b"printf\0\0x\0")) == "printf  x"


def test_a_command_line_cut_by_the_kernels_buffer_says_so():
    assert command_of(exec_event(b"cc\0" + b"a" * (ARGV_BYTES - 3), total=9000)).endswith("aaa…")


def test_without_arguments_the_file_names_the_command():
    assert command_of(exec_event(b"")) == "/usr/bin/pytest"


def test_bytes_that_are_not_text_are_replaced():
    assert command_of(exec_event(b"cat\0\xff\xfe\0")) == "cat \ufffd\ufffd"


def test_an_address_is_written_as_people_write_it():
    assert address_text(bytes(15) + b"\1") == "::1"
    assert address_text(bytes(10) + b"\xff\xff\x0a\0\0\2") == "10.0.0.2"
