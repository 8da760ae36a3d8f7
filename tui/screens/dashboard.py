"""The dashboard: host, tool calls, KV, decisions."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import DataTable, Footer

from ...daemon.api.v1.policy_pb2 import DecisionView, ToolCallView, WatchResponse
from ..order import Order, ordered
from ..widgets.banner import Banner
from ..widgets.decisions import DecisionTable
from ..widgets.host_line import HostLine
from ..widgets.kv_panel import KvPanel
from ..widgets.tool_calls import ToolCallTable


class Dashboard(Screen[None]):
    """Shows one answer at a time. While paused it keeps what it shows and remembers only the newest answer."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause", "Pause"),
        Binding("s", "sort", "Sort"),
        Binding("tab", "app.focus_next", "Next table", show=False),
    ]

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012 - Textual declares it without ClassVar

    class Ready(Message):
        """The widgets stand: answers may come."""

    class ToolCallChosen(Message):
        def __init__(self, call: ToolCallView, now_ns: int) -> None:
            super().__init__()
            self.call = call
            self.now_ns = now_ns

    class DecisionChosen(Message):
        def __init__(self, decision: DecisionView, now_ns: int) -> None:
            super().__init__()
            self.decision = decision
            self.now_ns = now_ns

    order: reactive[Order] = reactive(Order.NEWEST, init=False)
    paused: reactive[bool] = reactive(False, init=False)
    lost: reactive[str] = reactive("", init=False)
    """Why the daemon is not heard; empty: it is."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: WatchResponse | None = None
        self._newest: WatchResponse | None = None

    def compose(self) -> ComposeResult:
        yield Banner(id="banner")
        yield HostLine(id="host")
        yield ToolCallTable(id="calls")
        with Horizontal(id="below"):
            yield KvPanel(id="kv")
            yield DecisionTable(id="decisions")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(ToolCallTable).focus()
        self._show_titles()
        self.post_message(self.Ready())

    def take(self, response: WatchResponse) -> None:
        """The newest answer."""
        self._newest = response
        self.lost = ""
        if not self.paused:
            self._show(response)

    def watch_paused(self, paused: bool) -> None:
        self._show_banner()
        if not paused and self._newest is not None:
            self._show(self._newest)

    def watch_lost(self) -> None:
        self._show_banner()

    def watch_order(self) -> None:
        self._show_titles()
        if self._shown is not None:
            self._show(self._shown)

    def action_pause(self) -> None:
        self.paused = not self.paused

    def action_sort(self) -> None:
        self.order = self.order.next()

    @on(DataTable.RowSelected, "#calls")
    def _choose_call(self, event: DataTable.RowSelected) -> None:
        if self._shown is None:
            return
        for call in self._shown.tool_calls:
            if call.tool_call_id == event.row_key.value:
                self.post_message(self.ToolCallChosen(call, self._shown.now_ns))

    @on(DataTable.RowSelected, "#decisions")
    def _choose_decision(self, event: DataTable.RowSelected) -> None:
        if self._shown is None:
            return
        for decision in self._shown.decisions:
            if decision.decision_id == event.row_key.value:
                self.post_message(self.DecisionChosen(decision, self._shown.now_ns))

    def _show(self, response: WatchResponse) -> None:
        if not self.query(HostLine):
            return  # an answer that arrives while the application is being taken down
        self._shown = response
        self.query_one(HostLine).host = response.host
        self.query_one(KvPanel).response = response
        self.query_one(ToolCallTable).show_calls(ordered(response.tool_calls, self.order), response.now_ns)
        self.query_one(DecisionTable).show_decisions(response.decisions, response.now_ns)
        self._show_titles()

    def _show_titles(self) -> None:
        calls = self._shown.tool_calls if self._shown else ()
        running = sum(not call.end_ns for call in calls)
        table = self.query_one(ToolCallTable)
        table.border_title = f"Tool calls: {running} running, {len(calls) - running} ended in the last minute"
        table.border_subtitle = f"by {self.order.value}, enter: explain"

    def _show_banner(self) -> None:
        if not self.query(Banner):
            return
        banner = self.query_one(Banner)
        banner.alarm = bool(self.lost)
        paused = "paused: press p to go on"
        banner.text = f"{self.lost}: what you see is old; trying again" if self.lost else paused if self.paused else ""
