"""The long memory of decisions: what the journal knows of other runs and boots, for `explain`.

Owns the search. It opens the journal anew for each question, reads and closes it: what is asked seldom keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...policies.actions import Decision, Outcome
from ...policies.model import ToolCall, ToolCallId
from .journal import JournalReader, Run


@dataclass(frozen=True, slots=True)
class Past:
    """A decision of whichever run, and what came of it last."""

    decision: Decision
    outcome: Outcome | None
    run: Run

    @property
    def at_unix_ns(self) -> int:
        """By the wall clock: the run's start tells how its boot's clock stood to it."""
        return self.decision.at_ns - self.run.started_ns + self.run.started_unix_ns


def find(
    journal: Path,
    limit: int,
    *,
    decision: str = "",
    tool_call: ToolCallId | None = None,
    session: str = "",
    tenant: str = "",
) -> list[Past]:
    """Newest first; each given argument narrows down. Raises JournalError."""
    with JournalReader(journal) as reader:
        runs = {run.id: run for run in reader.runs()}
        found = reader.find_decisions(limit, decision=decision, tool_call=tool_call, session=session, tenant=tenant)
        return [Past(made, came, runs[run]) for run, made, came in found if run in runs]


def call_and_time(journal: Path, call: ToolCallId) -> list[tuple[ToolCall, list[Decision]]]:
    """A call as it was last written down, and all that its run decided while it ran, newest first. Raises JournalError.

    One pair, or none where no run knows it.
    """
    with JournalReader(journal) as reader:
        known = reader.tool_call(call)
        if known is None:
            return []
        return [(known, reader.decisions_while(known))]


def calls_ending(journal: Path, text: str) -> list[ToolCallId]:
    """Tool calls of any run whose id begins or ends with these hex digits. Raises JournalError."""
    with JournalReader(journal) as reader:
        return reader.tool_call_ids(text)
