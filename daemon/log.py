"""Logging as an event name plus key=value pairs, on the standard library's logging.

Owns the one format. A message is never prose: `event("sandbox_registered", tenant="gold", memory_bytes=1024)` writes
`2026-01-31T10:15:30.123 info sandbox_registered tenant=gold memory_bytes=1024`. Values with blanks, quotes or
control characters are quoted, so that a line stays one line and splits the same way it was joined.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from enum import Enum
from typing import TextIO

_LOGGER = logging.getLogger("equipoise")
_LOGGER.addHandler(logging.NullHandler())

Value = str | int | float | bool | None | Enum | BaseException


def event(name: str, level: int = logging.INFO, /, **fields: Value) -> None:
    """Log one event. Floats are cut to 6 significant digits; None is written as `-`."""
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, "%s", " ".join([name, *(f"{key}={_text(value)}" for key, value in fields.items())]))


def warning(name: str, /, **fields: Value) -> None:
    """An event that somebody should look at, though the daemon goes on."""
    event(name, logging.WARNING, **fields)


def debug(name: str, /, **fields: Value) -> None:
    event(name, logging.DEBUG, **fields)


def configure(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send events to `stream` (default: standard error). Calling it again replaces the earlier stream."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_LineFormatter())
    for old in list(_LOGGER.handlers):
        _LOGGER.removeHandler(old)
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(level)
    _LOGGER.propagate = False


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        return f"{when}.{int(record.msecs):03d} {record.levelname.lower()} {record.getMessage()}"


def _text(value: Value) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.6g}"
        case Enum():
            return _text(str(value.value))
        case BaseException():
            return _text(f"{type(value).__name__}: {value}")
    text = str(value)
    if text and all(c.isprintable() and c not in ' "=' for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)
