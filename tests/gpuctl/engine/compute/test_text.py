"""Text of a turn as its tokens come: characters and stop strings that are split over several."""

from __future__ import annotations

from equipoise.gpuctl.engine.compute.text import TextStream
from hypothesis import given
from hypothesis import strategies as st


def test_a_character_split_over_tokens_appears_once_whole():
    stream = TextStream()
    snowman = "☃".encode()
    assert stream.push(snowman[:1]) == ""
    assert stream.push(snowman[1:]) == "☃"


def test_an_unfinished_character_becomes_a_replacement_at_the_end():
    stream = TextStream()
    assert stream.push("☃".encode()[:2]) == ""
    assert stream.flush() == "\ufffd"


@given(text=st.text("abS#", max_size=30), cuts=st.lists(st.integers(0, 30)))
def test_a_stop_string_cuts_the_same_however_the_text_arrives(text, cuts):
    stream = TextStream(("S#", "bb"))
    data, out, last = text.encode(), "", 0
    for cut in [*sorted(cuts), len(data)]:
        out += stream.push(data[last:cut])
        last = max(last, cut)
    out += stream.flush()
    found = [at for stop in ("S#", "bb") if (at := text.find(stop)) >= 0]
    # The stop string that is complete first ends the text, so where two overlap either may.
    assert stream.stopped == bool(found)
    if not found:
        assert out == text
    else:
        assert text.startswith(out)
        assert "S#" not in out
        assert "bb" not in out
