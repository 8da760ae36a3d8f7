"""What the demo shows while it runs: a live table on a terminal, a line every two seconds elsewhere.

Owns that view of one WatchResponse. Must not: keep state of its own beyond the time of the last line.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..api.v1.policy_pb2 import ToolCallView, WatchResponse
from .tables import tenant_markup
from .words import DASH, ending, seconds, shortened, size

_LINE_EVERY_S = 2.0
_ROWS = 14
_BAR_WIDTH = 10


class View(Protocol):
    """Shows the newest answer; a context manager so that a terminal is left as it was found."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, response: WatchResponse) -> None: ...


def view_for(console: Console, limit_s: float) -> View:
    return TableView(console, limit_s) if console.is_terminal else LineView(console, limit_s)


class LineView:
    def __init__(self, console: Console, limit_s: float) -> None:
        self._console = console
        self._limit_s = limit_s
        self._begin = time.monotonic()
        self._last = 0.0

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, response: WatchResponse) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            text = f"{now - self._begin:4.0f} of {self._limit_s:.0f} s  {status_line(response)}"
            self._console.print(escape(text), highlight=False, soft_wrap=True)


class TableView:
    def __init__(self, console: Console, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begin = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> TableView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, response: WatchResponse) -> None:
        self._live.update(picture(response, time.monotonic() - self._begin, self._limit_s))


def status_line(response: WatchResponse) -> str:
    """Everything in one line: tool calls, their memory against the pool, KV by tier, the newest decision."""
    running = [c for c in response.tool_calls if not c.end_ns]
    held = [c for c in running if c.phase != "running"]
    parts = [f"{len(running)} tool calls" + (f" ({len(held)} held back)" if held else "")]
    parts.append(f"memory {size(response.host.tool_used_bytes)} of {size(response.host.tool_pool_bytes)}")
    for engine in response.engines:
        parts.append(
            f"KV {engine.device_used_tokens} of {engine.device_capacity_tokens} tokens"
            f" + {size(engine.host_used_bytes)} in host RAM"
        )
    if response.decisions:
        newest = response.decisions[0]
        parts.append(shortened(newest.action, 60))
    return " | ".join(parts)


def picture(response: WatchResponse, elapsed_s: float, limit_s: float) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("agent", no_wrap=True)
    table.add_column("tool call", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("state", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("memory of its budget", no_wrap=True)
    table.add_column("KV held", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for call in sorted(response.tool_calls, key=lambda c: bool(c.end_ns))[:_ROWS]:
        table.add_row(*_row(call, response.now_ns))
    lines = [Text.from_markup(f"[bold]{elapsed_s:.0f}[/] of {limit_s:.0f} s  {escape(status_line(response))}")]
    for decision in response.decisions[:5]:
        took = "" if not decision.HasField("latency_ms") else f" after {decision.latency_ms:.1f} ms"
        lines.append(
            Text.from_markup(
                f"  {tenant_markup(decision.tenant_id, decision.action)}: {escape(decision.evidence)}"
                f" [dim]{decision.outcome}{took}[/]"
            )
        )
    return Group(table, *lines)


def _row(call: ToolCallView, now_ns: int) -> tuple[str, ...]:
    style = "dim" if call.end_ns else "red" if call.phase in ("stopped", "killed") else "bold"
    state = ending(
        call.exit_code if call.HasField("exit_code") else None, call.signal if call.HasField("signal") else None
    )
    return (
        tenant_markup(call.tenant_id, f"{call.tenant_id}/{call.sandbox}"),
        f"[{style}]{escape(shortened(call.command, 60))}[/]",
        f"[{style}]{state if call.end_ns else call.phase}[/]",
        seconds((call.end_ns or now_ns) - call.start_ns),
        f"{_bar(call.used_bytes, call.hard_bytes)} {size(call.peak_bytes if call.end_ns else call.used_bytes)}",
        size(call.kv_held_bytes) if call.kv_held_bytes else DASH,
        call.verdict or DASH,
    )


def _bar(used_bytes: int, budget_bytes: int) -> str:
    if not budget_bytes:
        return " " * _BAR_WIDTH
    ratio = min(1.0, used_bytes / budget_bytes)
    full = round(ratio * _BAR_WIDTH)
    colour = "red" if ratio > 0.9 else "yellow" if ratio > 0.7 else "green"
    return f"[{colour}]{'█' * full}[/][dim]{'░' * (_BAR_WIDTH - full)}[/]"
