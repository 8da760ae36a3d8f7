"""What a check of `equipoise doctor` answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    """It works, with less than it could."""
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Row:
    """One finding. `remedy` is empty where nothing needs to be done."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = False
    """The daemon does not run without it."""


Check = Callable[[], Iterable[Row]]
