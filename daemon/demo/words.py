"""Quantities as people read them. Owns nothing but formatting."""

from __future__ import annotations

import signal

DASH = "-"


def size(amount_bytes: float | None) -> str:
    """ "4.2 MiB"; DASH for None."""
    if amount_bytes is None:
        return DASH
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount_bytes >= scale:
            value = amount_bytes / scale
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{amount_bytes:.0f} B"


def seconds(amount_ns: float | None) -> str:
    """ "12 ms" or "3.4 s"; DASH for None."""
    if amount_ns is None:
        return DASH
    return f"{amount_ns / 1e9:.1f} s" if amount_ns >= 1e9 else f"{amount_ns / 1e6:.0f} ms"


def byte_seconds(amount: float) -> str:
    """ "31 MiB·s"."""
    return f"{amount / (1 << 20):.1f} MiB·s" if amount >= 1 << 16 else DASH


def ending(exit_code: int | None, by_signal: int | None) -> str:
    """ "exit 0", "SIGKILL", or DASH where neither is known."""
    if by_signal is not None:
        try:
            return signal.Signals(by_signal).name
        except ValueError:
            return f"signal {by_signal}"
    return DASH if exit_code is None else f"exit {exit_code}"


def shortened(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
