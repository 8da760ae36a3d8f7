"""Reading a journal, of a live daemon or a dead one, without ever writing to it.

Owns the way from rows back to facts. `explain`, `ps`, `history` and the guardian read through this. Unless a run is
named, answers are about the latest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ....policies.actions import Decision, Outcome, OutcomeStatus
from ....policies.events import SessionMoved
from ....policies.model import DecisionId, Sandbox, TenantId, ToolCall, ToolCallId
from ...errors import JournalError
from . import codec
from .hold import Hold
from .records import Loss, Run, Sample, Series, Turn
from .schema import PATIENCE_S, connect, unusable

T = TypeVar("T")
_RUNS_OF_BOOT = "SELECT id FROM runs WHERE boot_id = ?"


class JournalReader:
    """Raises JournalError, one clear line, where the file is damaged, foreign or absent."""

    def __init__(self, path: Path, *, patience_s: float = PATIENCE_S) -> None:
        self.path = path
        self._connection = connect(path, readonly=True, patience_s=patience_s)

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def runs(self) -> tuple[Run, ...]:
        """Oldest first."""
        rows = self._rows("SELECT id, boot_id, pid, started_ns, started_unix_ns, ended_ns FROM runs ORDER BY id")
        return tuple(Run(*row) for row in rows)

    def latest_run(self) -> Run:
        runs = self.runs()
        if not runs:
            raise JournalError(f"{self.path}: no daemon has written to it yet: start one")
        return runs[-1]

    def sandboxes(self, run: int | None = None) -> tuple[Sandbox, ...]:
        return self._bodies(Sandbox, "SELECT body FROM sandboxes WHERE run = ? ORDER BY cgroup_id", run)

    def tool_calls(self, run: int | None = None) -> tuple[ToolCall, ...]:
        """In the order in which they started."""
        return self._bodies(ToolCall, "SELECT body FROM tool_calls WHERE run = ? ORDER BY start_ns, id", run)

    def tool_call(self, tool_call: ToolCallId) -> ToolCall | None:
        """Of whichever run."""
        rows = self._rows("SELECT body FROM tool_calls WHERE id = ? ORDER BY run DESC LIMIT 1", f"{tool_call:016x}")
        return next((self._decode(ToolCall, body) for (body,) in rows), None)

    def decisions(self, run: int | None = None, *, tool_call: ToolCallId | None = None) -> tuple[Decision, ...]:
        """Oldest first; only those about one tool call where it is given, of whichever run."""
        if tool_call is not None:
            rows = self._rows("SELECT body FROM decisions WHERE tool_call = ? ORDER BY at_ns, id", f"{tool_call:016x}")
            return tuple(self._decode(Decision, body) for (body,) in rows)
        return self._bodies(Decision, "SELECT body FROM decisions WHERE run = ? ORDER BY at_ns, id", run)

    def outcomes(self, run: int | None = None, *, decision: DecisionId | None = None) -> tuple[Outcome, ...]:
        """Oldest first; only those of one decision where it is given, of whichever run."""
        columns = "SELECT decision, status, at_ns, tier, detail, latency_ns FROM outcomes"
        if decision is not None:
            rows = self._rows(f"{columns} WHERE decision = ? ORDER BY at_ns", decision)
        else:
            rows = self._rows(f"{columns} WHERE run = ? ORDER BY at_ns", self._run(run))
        return tuple(Outcome(row[0], OutcomeStatus(row[1]), *row[2:]) for row in rows)

    def turns(self, run: int | None = None) -> tuple[Turn, ...]:
        return self._bodies(Turn, "SELECT body FROM turns WHERE run = ? ORDER BY coalesce(started_ns, ended_ns)", run)

    def moves(self, run: int | None = None) -> tuple[SessionMoved, ...]:
        return self._bodies(SessionMoved, "SELECT body FROM moves WHERE run = ? ORDER BY at_ns", run)

    def samples(self, run: int | None = None) -> tuple[Sample, ...]:
        rows = self._rows(
            "SELECT at_ns, series, tenant, key, bytes FROM samples WHERE run = ? ORDER BY at_ns, rowid", self._run(run)
        )
        return tuple(
            Sample(at, Series(series), TenantId(tenant), key, value) for at, series, tenant, key, value in rows
        )

    def losses(self, run: int | None = None) -> tuple[Loss, ...]:
        rows = self._rows("SELECT at_ns, source, count FROM losses WHERE run = ? ORDER BY at_ns", self._run(run))
        return tuple(Loss(*row) for row in rows)

    # -- of one boot, by whichever run

    def registered(self, boot_id: str) -> tuple[Sandbox, ...]:
        """Sandboxes that were registered and not removed."""
        rows = self._rows(f"SELECT body FROM registered WHERE run IN ({_RUNS_OF_BOOT}) ORDER BY cgroup_id", boot_id)
        return tuple(self._decode(Sandbox, body) for (body,) in rows)

    def open_calls(self, boot_id: str) -> tuple[ToolCall, ...]:
        """Calls that had not ended, or of which processes were left, when they were last written down."""
        rows = self._rows(
            f"SELECT id, body FROM tool_calls WHERE run IN ({_RUNS_OF_BOOT}) AND id IN (SELECT id FROM tool_calls "
            "WHERE body LIKE '%\"gone_ns\":null%') AND id NOT IN (SELECT id FROM merges) ORDER BY run",
            boot_id,
        )
        newest = {key: self._decode(ToolCall, body) for key, body in rows}
        return tuple(call for call in newest.values() if call.gone_ns is None)

    def merges(self, boot_id: str) -> dict[ToolCallId, ToolCallId]:
        rows = self._rows(f"SELECT id, into_id FROM merges WHERE run IN ({_RUNS_OF_BOOT})", boot_id)
        return {ToolCallId(int(merged, 16)): ToolCallId(int(into, 16)) for merged, into in rows}

    def newest_calls(self, boot_id: str, limit: int) -> tuple[ToolCall, ...]:
        """As they were last written down, those that started last, oldest first."""
        rows = self._rows(
            f"SELECT id, run, body FROM tool_calls WHERE run IN ({_RUNS_OF_BOOT}) ORDER BY start_ns DESC LIMIT ?",
            boot_id,
            limit,
        )
        latest: dict[str, tuple[int, str]] = {}
        for key, run, body in rows:
            latest[key] = max(latest.get(key, (0, "")), (run, body))
        calls = (self._decode(ToolCall, body) for _, body in latest.values())
        return tuple(sorted(calls, key=lambda call: call.start_ns))

    def newest_decisions(self, boot_id: str, limit: int) -> tuple[tuple[Decision, Outcome | None], ...]:
        """With the newest outcome of each, oldest first."""
        rows = self._rows(
            f"SELECT body FROM decisions WHERE run IN ({_RUNS_OF_BOOT}) ORDER BY at_ns DESC LIMIT ?", boot_id, limit
        )
        made = [self._decode(Decision, body) for (body,) in rows]
        made.reverse()
        if not made:
            return ()
        outcomes = self._rows(
            "SELECT decision, status, at_ns, tier, detail, latency_ns FROM outcomes WHERE run IN "
            f"({_RUNS_OF_BOOT}) AND at_ns >= ? ORDER BY at_ns",
            boot_id,
            made[0].at_ns,
        )
        came_of = {row[0]: Outcome(row[0], OutcomeStatus(row[1]), *row[2:]) for row in outcomes}
        return tuple((decision, came_of.get(decision.id)) for decision in made)

    # -- of whichever run and boot

    def find_decisions(
        self,
        limit: int,
        *,
        decision: str = "",
        tool_call: ToolCallId | None = None,
        session: str = "",
        tenant: str = "",
    ) -> list[tuple[int, Decision, Outcome | None]]:
        """Run, decision and its newest outcome, newest first; each given argument narrows down."""
        call = f"{tool_call:016x}" if tool_call is not None else ""
        asked = {"id": decision, "tool_call": call, "session": session, "tenant": tenant}
        narrow = [column for column, value in asked.items() if value]
        where = f"WHERE {' AND '.join(f'{column} = ?' for column in narrow)}" if narrow else ""
        rows = self._rows(
            f"SELECT run, body FROM decisions {where} ORDER BY run DESC, at_ns DESC LIMIT ?",
            *(asked[column] for column in narrow),
            limit,
        )
        made = [(run, self._decode(Decision, body)) for run, body in rows]
        return [(run, each, self._newest_outcome(run, each.id)) for run, each in made]

    def decisions_while(self, call: ToolCall, limit: int = 1000) -> list[Decision]:
        """What the runs of its boot decided from its start to its end, newest first."""
        boot = "SELECT boot_id FROM runs WHERE id = (SELECT max(run) FROM tool_calls WHERE id = ?)"
        rows = self._rows(
            f"SELECT body FROM decisions WHERE run IN (SELECT id FROM runs WHERE boot_id = ({boot})) AND at_ns >= ? "
            "AND at_ns <= ? ORDER BY at_ns DESC LIMIT ?",
            f"{call.id:016x}",
            call.start_ns,
            call.end_ns if call.end_ns is not None else 2**62,
            limit,
        )
        return [self._decode(Decision, body) for (body,) in rows]

    def tool_call_ids(self, text: str) -> list[ToolCallId]:
        """Those that begin or end with these hex digits."""
        if not text or text.strip("0123456789abcdefABCDEF"):
            return []
        rows = self._rows(
            "SELECT DISTINCT id FROM tool_calls WHERE id LIKE ? OR id LIKE ?", f"{text.lower()}%", f"%{text.lower()}"
        )
        return [ToolCallId(int(key, 16)) for (key,) in rows]

    def _newest_outcome(self, run: int, decision: DecisionId) -> Outcome | None:
        rows = self._rows(
            "SELECT decision, status, at_ns, tier, detail, latency_ns FROM outcomes WHERE decision = ? AND run = ? "
            "ORDER BY at_ns DESC, rowid DESC LIMIT 1",
            decision,
            run,
        )
        return next((Outcome(row[0], OutcomeStatus(row[1]), *row[2:]) for row in rows), None)

    def last_written_ns(self, boot_id: str) -> int:
        """The latest time on record; 0 where nothing is."""
        statement = (
            f"SELECT max(at_ns) FROM samples WHERE run IN ({_RUNS_OF_BOOT}) UNION ALL "
            f"SELECT max(start_ns) FROM tool_calls WHERE run IN ({_RUNS_OF_BOOT}) UNION ALL "
            "SELECT max(coalesce(ended_ns, 0)) FROM runs WHERE boot_id = ?"
        )
        return max((latest or 0 for (latest,) in self._rows(statement, boot_id, boot_id, boot_id)), default=0)

    def sandboxes_of_boot(self, boot_id: str) -> tuple[Sandbox, ...]:
        """Those that are gone too."""
        rows = self._rows(f"SELECT body FROM sandboxes WHERE run IN ({_RUNS_OF_BOOT}) ORDER BY run", boot_id)
        return tuple({s.cgroup_id: s for s in (self._decode(Sandbox, body) for (body,) in rows)}.values())

    def holds(self, boot_id: str) -> tuple[Hold, ...]:
        """What is on record as held back since this boot, by whichever run."""
        rows = self._rows(
            "SELECT body FROM holds WHERE run IN (SELECT id FROM runs WHERE boot_id = ?) ORDER BY id", boot_id
        )
        return tuple(self._decode(Hold, body) for (body,) in rows)

    # -- inside

    def _run(self, run: int | None) -> int:
        return self.latest_run().id if run is None else run

    def _bodies(self, kind: type[T], statement: str, run: int | None) -> tuple[T, ...]:
        return tuple(self._decode(kind, body) for (body,) in self._rows(statement, self._run(run)))

    def _rows(self, statement: str, *values: int | str) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise unusable(self.path, error) from error

    def _decode(self, kind: type[T], body: str) -> T:
        try:
            return codec.loads(kind, body)
        except ValueError as error:
            raise JournalError(f"{self.path}: a row cannot be read ({error}): move the file away") from error
