"""Figures as they appear on the dashboard: sizes, times, bars, colours. Owns formatting and nothing else."""

from __future__ import annotations

import signal

from rich.text import Text

from ..daemon.api.v1.policy_pb2 import DecisionView, ToolCallView
from ..policies.shown import printable

DASH = "-"
GOOD = "#6fae75"
WARN = "#e0b13c"
BAD = "#e06c5c"
_TENANT_STYLES = ("#e0b13c", "#9db4c8", "#d08a57", "#7fb69b", "#b79bd1", "#7fb7d4")
_NAMED_TENANT_STYLES = (("gold", "#e0b13c"), ("silver", "#9db4c8"), ("bronze", "#d08a57"))
_PHASE_STYLES = (
    ("running", GOOD),
    ("throttled", "#b79bd1"),
    ("frozen", "#7fb7d4"),
    ("stopped", f"bold {BAD}"),
    ("killed", f"bold {BAD}"),
    ("ended", "dim"),
)
_VERDICT_STYLES = (("keep", GOOD), ("swap", "#7fb7d4"), ("swap-disk", "#5a8fd0"), ("drop", BAD))


def size(amount_bytes: float) -> str:
    """ "107 MiB"; a dash for nothing."""
    if amount_bytes <= 0:
        return DASH
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount_bytes >= scale:
            value = amount_bytes / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{amount_bytes:.0f} B"


def duration(amount_ns: int) -> str:
    """ "3.4s", "2m05s" or "1h02m"."""
    seconds = max(0, amount_ns) / 1e9
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def tenant(name: str, text: str | None = None) -> Text:
    """The same tenant has the same colour everywhere and in every run."""
    for known, style in _NAMED_TENANT_STYLES:
        if name == known:
            return Text(text or name, style)
    return Text(text or name, _TENANT_STYLES[sum(name.encode()) % len(_TENANT_STYLES)])


def bar(used: float, whole: float, width: int, peak: float = 0.0) -> Text:
    """`used` solid, up to `peak` shaded, the rest of `whole` light; red when nearly full. Empty where whole is 0."""
    if whole <= 0 or width <= 0:
        return Text(" " * max(0, width))
    ratio = min(1.0, used / whole)
    solid = round(ratio * width)
    shaded = max(0, round(min(1.0, peak / whole) * width) - solid)
    style = BAD if ratio > 0.9 else WARN if ratio > 0.7 else GOOD
    text = Text()
    text.append("█" * solid, style)
    text.append("▓" * shaded, "dim " + style)
    text.append("░" * (width - solid - shaded), "#4a5560")
    return text


def phase(call: ToolCallView) -> Text:
    """The phase, or how an ended call ended."""
    if not call.end_ns:
        return Text(call.phase, dict(_PHASE_STYLES).get(call.phase, ""))
    if call.HasField("signal"):
        return Text(_signal_name(call.signal), f"bold {BAD}")
    if call.HasField("exit_code"):
        return Text(f"exit {call.exit_code}", "dim" if call.exit_code == 0 else WARN)
    return Text("ended", "dim")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def memory(call: ToolCallView, bar_width: int) -> Text:
    """Bar and figures: what it uses, shaded up to its peak, of its budget. Empty once it has ended."""
    if call.end_ns:
        return Text()
    text = bar(call.used_bytes, call.hard_bytes, bar_width, call.peak_bytes)
    text.append(f" {size(call.used_bytes)}")
    if call.hard_bytes:
        text.append(f" of {size(call.hard_bytes)}", "dim")
    return text


def verdict(name: str) -> Text:
    return Text(name or DASH, dict(_VERDICT_STYLES).get(name, "dim"))


def found(call: ToolCallView) -> Text:
    return Text(call.source if call.confidence >= 0.995 else f"{call.source} {call.confidence:.0%}", "dim")


def outcome(decision: DecisionView) -> Text:
    failed = decision.outcome in ("failed", "rejected", "expired")
    text = Text()
    nothing_done = decision.outcome in ("", "dry-run")
    text.append(decision.outcome or "sent", BAD if failed else "dim" if nothing_done else GOOD)
    if decision.HasField("latency_ms"):
        text.append(f" {decision.latency_ms:.1f} ms", "dim")
    return text


def one_line(text: str, width: int) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"
