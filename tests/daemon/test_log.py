"""The log's one format."""

from __future__ import annotations

import io
import shlex

from equipoise.daemon import log
from equipoise.policies.model import KvTier


def logged(name: str, **fields: log.Value) -> str:
    stream = io.StringIO()
    log.configure(stream=stream)
    log.event(name, **fields)
    return stream.getvalue()


def test_an_event_is_its_name_and_pairs_on_one_line() -> None:
    line = logged("swapped", tier=KvTier.HOST, tokens=12, ratio=1 / 3, enforced=True, reason=None)
    assert line.endswith(" info swapped tier=host tokens=12 ratio=0.333333 enforced=true reason=-\n")
    assert line.count("\n") == 1


def test_values_with_blanks_and_newlines_stay_one_field() -> None:
    line = logged("started", command='sh -c "a=b"\nrm', path="/sys/fs")
    assert line.count("\n") == 1
    fields = shlex.split(line)
    assert fields[-2].startswith("command=sh -c ") and fields[-1] == "path=/sys/fs"


def test_an_exception_is_logged_with_its_type() -> None:
    assert 'error="ValueError: too long"' in logged("failed", error=ValueError("too long"))
