"""Tool calls in text, whole and as it arrives."""

from __future__ import annotations

import pytest
from equipoise.gpuctl.engine.compute.tool_calls import (
    ToolCall,
    ToolCallStream,
    asked_for,
    call_id,
    command_of,
    tool_calls_in,
)
from hypothesis import given
from hypothesis import strategies as st

CALL = '<tool_call>\n{"name": "run", "arguments": {"cmd": "ls"}}\n</tool_call>'


def test_calls_are_found_and_the_text_before_them_is_the_content():
    assert tool_calls_in(f"I will.\n{CALL}\n{CALL} bye") == ("I will.", [ToolCall("run", '{"cmd": "ls"}')] * 2)


BROKEN = (
    "<tool_call>{not json}</tool_call>",
    "<tool_call>run</tool_call>",
    '<tool_call>{"a": 1}</tool_call>',
    "<tool_call>\n{",
    "<tool_call>" + "[" * 9000,
    '<tool_call>{"name": ' + "[" * 9000 + "}</tool_call>",
)


def test_a_malformed_call_stays_text():
    for broken in BROKEN:
        assert tool_calls_in(broken) == (broken, [])
    assert tool_calls_in(f"<tool_call>no {CALL}") == ("<tool_call>no", [ToolCall("run", '{"cmd": "ls"}')])


def test_the_end_mark_inside_an_argument_does_not_end_the_call():
    text = '<tool_call>{"name": "say", "arguments": {"text": "</tool_call>"}}</tool_call>'
    assert tool_calls_in(text)[1] == [ToolCall("say", '{"text": "</tool_call>"}')]


def test_text_streams_at_once_and_only_what_may_begin_a_call_is_held():
    stream = ToolCallStream()
    assert stream.push("I like a < b") == ("I like a < b", [])
    assert stream.push(", and \n") == (", and", [])
    assert stream.push("<tool") == ("", [])
    assert stream.push("box>") == (" \n<toolbox>", [])
    assert stream.push(" <tool_call>\n") == ("", [])
    assert stream.push('{"name": "a"}') == ("", [])
    assert stream.push("</tool_call>") == ("", [ToolCall("a", "{}")])
    assert stream.flush() == ""


PARTS = ["<tool_call>", "</tool_call>", '{"name": "a"}', "{", "}", " ", "\n", "x", "<", CALL, "<tool_"]


@given(pieces=st.lists(st.sampled_from(PARTS), max_size=12), cuts=st.lists(st.integers(0, 200)))
def test_however_the_text_arrives_it_comes_to_the_same(pieces, cuts):
    text = "".join(pieces)
    stream, content, calls, last = ToolCallStream(), "", [], 0
    for cut in [*sorted(cuts), len(text)]:
        more, found = stream.push(text[last:cut])
        content += more
        calls += found
        last = max(last, cut)
    content += stream.flush()
    assert (content, calls) == tool_calls_in(text)
    assert calls or content == text


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ('{"command": "ls -l"}', "ls -l"),
        ('{"cmd": ["bash", "-lc", "ls"]}', "bash -lc ls"),
        ('{"path": "a.txt"}', ""),
        ('{"command": 7}', ""),
        ("[1]", ""),
        ("{", ""),
    ],
)
def test_the_command_in_a_calls_arguments_is_told_and_nothing_is_made_up(arguments, command):
    assert command_of(arguments) == command


def test_a_call_has_one_id_for_its_client_and_for_the_daemon():
    calls = [ToolCall("bash", '{"command": "ls"}'), ToolCall("read", '{"path": "a"}')]
    first, second = asked_for("turn-7", calls)
    assert (first.call_id, first.name, first.command) == (call_id("turn-7", 0), "bash", "ls")
    assert second.call_id == call_id("turn-7", 1) != call_id("turn-8", 1)
