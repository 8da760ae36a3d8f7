"""The table of tool calls."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from ...daemon.api.v1.policy_pb2 import ToolCallView
from .. import text
from .rows import Column, Row, RowTable

_BAR_WIDTH = 10


class ToolCallTable(RowTable):
    BORDER_TITLE = "Tool calls"
    COLUMNS = (
        Column("agent", "AGENT", 14),
        Column("command", "COMMAND", 0),
        Column("phase", "PHASE", 9),
        Column("time", "TIME", 7, right=True),
        Column("memory", "MEMORY OF ITS BUDGET", 29),
        Column("peak", "PEAK", 8, right=True),
        Column("kv", "KV HELD", 8, right=True),
        Column("verdict", "VERDICT", 9),
        Column("found", "FOUND BY", 12),
    )

    def show_calls(self, calls: Iterable[ToolCallView], now_ns: int) -> None:
        self.show_rows([Row(call.tool_call_id, _cells(call, now_ns)) for call in calls])


def _cells(call: ToolCallView, now_ns: int) -> tuple[Text | str, ...]:
    return (
        text.tenant(call.tenant_id, f"{call.tenant_id}/{call.sandbox}"),
        Text(text.one_line(call.command, 200), "dim" if call.end_ns else "", no_wrap=True, overflow="ellipsis"),
        text.phase(call),
        Text(text.duration((call.end_ns or now_ns) - call.start_ns), justify="right"),
        text.memory(call, _BAR_WIDTH),
        Text(text.size(call.peak_bytes), justify="right"),
        Text(text.size(call.kv_held_bytes), justify="right"),
        text.verdict(call.verdict),
        text.found(call),
    )
