"""Quantities as they stand in a document: amounts of memory, times, ratios. Each has its unit, and is written with one.

Owns the units. A quantity that does not read raises `Wrong` with what would be right.
"""

from __future__ import annotations

import re

from .problems import DocumentError, Problem, kind, near, shown

_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BYTES |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([A-Za-z%]+)")
_LARGEST = 1 << 62
"""Every quantity fits the 64 bits that carry it, sums of two included."""

BYTES_PATTERN = rf"^\s*{_NUMBER}\s*({'|'.join(_BYTES)})\s*$"
TIME_PATTERN = rf"^\s*{_NUMBER}\s*({'|'.join(_TIMES)})\s*$"
PERCENT_PATTERN = rf"^\s*{_NUMBER}\s*%\s*$"
"""Regular expressions of what reads, for the JSON Schema."""


class Wrong(ValueError):
    """A value that is none of its kind; says what would be right."""


def bytes_of(value: object) -> int:
    """ "512MiB" -> bytes, above 0."""
    amount = _amount(value, _BYTES, "512MiB")
    if amount <= 0:
        raise Wrong("must be above 0")
    if amount > _LARGEST:
        raise Wrong("must be at most 4 EiB")
    return amount


def ns_of(value: object) -> int:
    """ "1.5s" -> nanoseconds, 0 and above."""
    amount = _amount(value, _TIMES, "10s")
    if amount > _LARGEST:
        raise Wrong("must be at most a century")
    return amount


def life_of(value: object) -> int:
    """As ns_of, and above 0."""
    if (amount := ns_of(value)) <= 0:
        raise Wrong("must be above 0")
    return amount


def ratio_of(value: object) -> float:
    """ "80%" or 0.8 -> 0.8, within 0 and 1."""
    if isinstance(value, str) and value.strip().endswith("%"):
        number, unit = _split(value, "80%")
        ratio = number / 100 if unit == "%" else -1.0
    elif isinstance(value, float | int) and not isinstance(value, bool):
        ratio = float(value) if -1 <= value <= 2 else -1.0
    else:
        raise Wrong(f"expected a ratio such as 0.8 or `80%`, found {kind(value)}")
    if not 0.0 <= ratio <= 1.0:
        raise Wrong(f"must be within 0 and 1, found {kind(value)}")
    return ratio


def share_of(value: object) -> float:
    """As ratio_of, and above 0."""
    if not (ratio := ratio_of(value)):
        raise Wrong("must be above 0")
    return ratio


def parse_bytes(value: object, path: str) -> int:
    """As bytes_of, for what stands alone. Raises DocumentError, which begins with `path`."""
    try:
        return bytes_of(value)
    except Wrong as wrong:
        raise DocumentError(Problem((path,), str(wrong))) from None


def written_bytes(amount: int) -> str:
    """ "512MiB": in the largest unit in which it is whole."""
    return _written(amount, {unit: size for unit, size in _BYTES.items() if "i" in unit or unit == "B"})


def written_ns(amount: int) -> str:
    return _written(amount, _TIMES) if amount else "0s"


def written_ratio(ratio: float) -> float | str:
    """ "80%" where that says the same, else the number itself."""
    percent = f"{ratio * 100:.12g}%"
    return percent if "e" not in percent and ratio_of(percent) == ratio else ratio


def _written(amount: int, units: dict[str, int]) -> str:
    unit = max((u for u in units if amount % units[u] == 0), key=lambda u: units[u])
    return f"{amount // units[unit]}{unit}"


def _amount(value: object, units: dict[str, int], example: str) -> int:
    number, unit = _split(value, example)
    if unit not in units:
        hint = near(unit, units)
        raise Wrong(
            f"unknown unit `{shown(unit)}`; " + (hint if hint.startswith("did") else f"use one of {', '.join(units)}")
        )
    return int(number * units[unit])


def _split(value: object, example: str) -> tuple[float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise Wrong(f"a bare number has no unit; write it as `{example}`")
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Wrong(f"expected a quantity such as `{example}`, found {kind(value)}")
    return float(match[1]), match[2]
