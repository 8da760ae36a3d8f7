"""Everything about one tool call, or one decision: what was measured, what was done, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.widgets import Static

from ...daemon.api.v1.policy_pb2 import DecisionView, ToolCallView
from ...policies.shown import printable
from .. import text


class Detail(ModalScreen[None]):
    """`decisions` may come later: they are asked for when the screen opens."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "Back")]

    decisions: reactive[Sequence[DecisionView] | None] = reactive(None, init=False)
    problem: reactive[str] = reactive("", init=False)

    def __init__(self, title: str, now_ns: int, call: ToolCallView | None = None) -> None:
        super().__init__()
        self._title = title
        self._now_ns = now_ns
        self._call = call

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="detail") as box:
            box.border_title = Content(text.one_line(self._title, 80))  # not markup: commands hold brackets
            box.border_subtitle = "esc: back"
            if self._call is not None:
                yield Static(_facts(self._call, self._now_ns), id="facts")
            yield Static(Text("asking the daemon", "dim"), id="why")

    def watch_decisions(self, decisions: Sequence[DecisionView] | None) -> None:
        if decisions is not None:
            self.query_one("#why", Static).update(_why(decisions, self._now_ns))

    def watch_problem(self, problem: str) -> None:
        self.query_one("#why", Static).update(Text(problem, text.BAD))


def _facts(call: ToolCallView, now_ns: int) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("agent", text.tenant(call.tenant_id, f"{call.tenant_id}/{call.sandbox}"))
    table.add_row("command", Text(printable(call.command)))
    table.add_row("phase", text.phase(call))
    if call.would_be:
        table.add_row("dry run", Text(f"would be {call.would_be}"))
    table.add_row("found by", f"{call.source}, confidence {call.confidence:.0%}, root process {call.pid or 'unknown'}")
    table.add_row("time", text.duration((call.end_ns or now_ns) - call.start_ns))
    if not call.end_ns:
        table.add_row("memory", text.memory(call, 24))
    table.add_row("peak", text.size(call.peak_bytes))
    if call.HasField("overshoot_bytes"):
        table.add_row("stopped", f"at its budget, {text.size(call.overshoot_bytes)} above it at most")
    if call.stalled_ns:
        table.add_row("held back", text.duration(call.stalled_ns))
    if call.escaped_count:
        table.add_row("escaped", f"{call.escaped_count} processes outlived it")
    idle = call.kv_idle_byte_seconds / (1 << 20)
    table.add_row("KV held", f"{text.size(call.kv_held_bytes)}; {text.size(call.kv_at_peak_bytes)} at the memory peak")
    table.add_row("KV idle", f"{idle:.1f} MiB·s on the device")
    table.add_row("verdict", text.verdict(call.verdict))
    for action in call.actions:
        table.add_row("done", Text(action))
    for fact in call.facts:
        table.add_row("seen", Text(fact))
    return table


def _why(decisions: Sequence[DecisionView], now_ns: int) -> RenderableType:
    if not decisions:
        return Text("\nNothing was decided about it.", "dim")
    parts: list[RenderableType] = []
    for decision in decisions:
        head = Text("\n")
        head.append(decision.action, "bold")
        head.append(f"  {text.duration(now_ns - decision.at_ns)} ago  ", "dim")
        head.append_text(text.outcome(decision))
        if decision.tier:
            head.append(f"  by {decision.tier}", "dim")
        parts.append(head)
        parts.append(Text(decision.rule))
        if decision.evidence:
            parts.append(Text(decision.evidence, "dim"))
        if decision.detail:
            parts.append(Text(decision.detail, "dim"))
        if len(decision.candidates) > 1:
            parts.append(_candidates(decision))
    return Group(*parts)


def _candidates(decision: DecisionView) -> Text:
    """What was weighed; the chosen one comes first."""
    line = Text("weighed: ", "dim")
    for index, candidate in enumerate(decision.candidates):
        line.append("" if index == 0 else "  ")
        line.append(f"{candidate.name} {candidate.cost:.3g}", "bold" if index == 0 else "dim")
    return line
