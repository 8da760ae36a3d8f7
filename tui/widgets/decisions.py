"""The last decisions with their evidence."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from ...daemon.api.v1.policy_pb2 import DecisionView
from .. import text
from .rows import Column, Row, RowTable


class DecisionTable(RowTable):
    """Two lines a decision: what was done to whom and what came of it; then why."""

    BORDER_TITLE = "Last decisions"
    ROW_HEIGHT = 2
    COLUMNS = (Column("ago", "AGO", 6, right=True), Column("decision", "DECISION, AND ITS EVIDENCE", 0))

    def show_decisions(self, decisions: Iterable[DecisionView], now_ns: int) -> None:
        self.show_rows([Row(decision.decision_id, _cells(decision, now_ns)) for decision in decisions])


def _cells(decision: DecisionView, now_ns: int) -> tuple[Text | str, ...]:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append_text(text.tenant(decision.tenant_id, text.one_line(decision.subject, 40)))
    line.append(f"  {decision.action}  ", "bold")
    line.append_text(text.outcome(decision))
    line.append(f"\n{text.one_line(decision.evidence or decision.rule, 300)}", "#9aa7b1")
    return Text(text.duration(now_ns - decision.at_ns), "dim", justify="right"), line
