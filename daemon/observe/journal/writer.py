"""The journal's one writer: what happened, in batches; what is held back, at once.

Owns the file while the daemon lives, by a lock beside it (`<journal>.lock`, which also names the daemon's pid).
Observations wait in memory and are written together by `flush()`; a hold is committed before `take()` returns, with
everything that waited. WAL without an fsync per commit (synchronous=NORMAL): what is committed survives the death
of the process, which is what holds need; after a power loss they mean nothing anyway.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ....policies.actions import Decision, Outcome
from ....policies.events import (
    DecisionMade,
    Event,
    EventsLost,
    OutcomeObserved,
    SandboxRegistered,
    SandboxRemoved,
    SessionMoved,
    ToolCallMerged,
    ToolCallWithdrawn,
    TurnEnded,
    TurnStarted,
)
from ....policies.model import CgroupId, Sandbox, ToolCall
from ... import log
from ...errors import JournalError
from . import codec
from .hold import Hold
from .records import Sample, Turn
from .schema import ROW_LIMITS, connect, unusable

BATCH_ROWS = 500
"""Written at the latest when so many rows wait."""
WAITING_ROWS = 20_000
"""Kept when the disk refuses; the oldest beyond it are lost and counted."""
_TRIM_EVERY = 64
"""Flushes between two trims."""
_LOCK_PATIENCE_S = 0.2


class Journal:
    """Open for writing. Only `take`, `extend` and `clear` raise (JournalError); the rest counts what it loses.

    Those three make it an `enforce.holds.HoldBook`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int, run: int) -> None:
        self.path = path
        self.lost_rows_count = 0
        self._connection = connection
        self._lock = lock
        self._run = run
        self._waiting: list[tuple[str, tuple[object, ...]]] = []
        self._turns: dict[tuple[str, str], Turn] = {}
        self._flush_count = 0
        self._refused = False

    @classmethod
    def open(cls, path: Path, *, boot_id: str, started_ns: int, pid: int | None = None) -> Journal:
        """Create or continue the journal. Raises JournalError: damaged, foreign, no permission, or another daemon's.

        Holds of another boot are forgotten: their processes and cgroups went with it. Those of this boot stay, for
        `guardian.release` to undo.
        """
        pid = pid or os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{path.parent}: {error.strerror}: give a directory that is yours to write") from error
        lock = acquire_lock(path, pid)
        try:
            connection = connect(path, readonly=False)
            try:
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(
                    "DELETE FROM holds WHERE run NOT IN (SELECT id FROM runs WHERE boot_id = ?)", (boot_id,)
                )
                run = connection.execute(
                    "INSERT INTO runs (boot_id, pid, started_ns, started_unix_ns) VALUES (?, ?, ?, ?)",
                    (boot_id, pid, started_ns, time.time_ns()),
                ).lastrowid
            except sqlite3.Error as error:
                connection.close()
                raise unusable(path, error) from error
        except JournalError:
            os.close(lock)
            raise
        return cls(path, connection, lock, run or 0)

    def close(self, ended_ns: int | None = None) -> None:
        """Write what waits, mark the run as ended in order where `ended_ns` is given, and give the file back."""
        self.flush()
        with contextlib.suppress(sqlite3.Error):  # a disk that refuses has been counted by flush()
            if ended_ns is not None:
                self._connection.execute("UPDATE runs SET ended_ns = ? WHERE id = ?", (ended_ns, self._run))
        self._connection.close()
        os.close(self._lock)

    # -- what happened

    def record(self, event: Event) -> None:
        """Note an event, where it is one that the journal keeps; the others are seen through the facts they change."""
        match event:
            case DecisionMade(decision=decision):
                self.record_decision(decision)
            case OutcomeObserved(outcome=outcome):
                self.record_outcome(outcome)
            case TurnStarted():
                self._turn_started(event)
            case TurnEnded():
                self._turn_ended(event)
            case SessionMoved():
                values = (event.at_ns, event.session, event.from_tier.value, event.to_tier.value, event.moved_bytes)
                self._add("INSERT INTO moves VALUES (?, ?, ?, ?, ?, ?, ?)", *values, codec.dumps(event))
            case EventsLost():
                self._add("INSERT INTO losses VALUES (?, ?, ?, ?)", event.at_ns, event.source, event.count)
            case SandboxRegistered(sandbox=sandbox):
                self.record_sandbox(sandbox)
            case SandboxRemoved(cgroup_id=cgroup_id):
                self.strike_sandbox(cgroup_id)
            case ToolCallMerged(id=merged, into=into):
                # The call it was taken for, by an earlier run too, has never been one. `run` is always the first value.
                self._add("DELETE FROM tool_calls WHERE ? NOTNULL AND id = ?", f"{merged:016x}")
                self._add("INSERT OR REPLACE INTO merges VALUES (?, ?, ?)", f"{merged:016x}", f"{into:016x}")
            case ToolCallWithdrawn(id=withdrawn):
                self._add("DELETE FROM tool_calls WHERE ? NOTNULL AND id = ?", f"{withdrawn:016x}")
            case _:
                pass

    def record_sandbox(self, sandbox: Sandbox) -> None:
        values = (sandbox.cgroup_id, sandbox.tenant, sandbox.name, sandbox.path, codec.dumps(sandbox))
        self._add("INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?, ?, ?, ?)", *values)
        self._add(
            "INSERT OR REPLACE INTO registered (run, cgroup_id, body) VALUES (?, ?, ?)",
            sandbox.cgroup_id,
            codec.dumps(sandbox),
        )

    def strike_sandbox(self, cgroup_id: CgroupId) -> None:
        """It is registered no more; what happened in it stays."""
        # Whichever run registered it. `run` is always the first value.
        self._add("DELETE FROM registered WHERE ? NOTNULL AND cgroup_id = ?", cgroup_id)

    def record_tool_call(self, call: ToolCall) -> None:
        """As it is now; the latest wins. Worth calling when it starts, when its phase changes and when it ends."""
        self._add(
            "INSERT OR REPLACE INTO tool_calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            f"{call.id:016x}",
            call.tenant,
            call.sandbox,
            call.session,
            call.command,
            call.kind,
            call.source.value,
            call.confidence,
            call.start_ns,
            call.end_ns,
            call.peak_bytes,
            call.verdict.value if call.verdict is not None else None,
            codec.dumps(call),
        )

    def record_decision(self, decision: Decision) -> None:
        action = decision.action
        tool_call = getattr(action, "tool_call", None)
        self._add(
            "INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            decision.id,
            decision.at_ns,
            decision.rule,
            type(action).__name__,
            decision.tenant,
            decision.subject,
            f"{tool_call:016x}" if tool_call is not None else None,
            getattr(action, "session", None),
            codec.dumps(decision),
        )

    def record_outcome(self, outcome: Outcome) -> None:
        values = (outcome.decision, outcome.at_ns, outcome.status.value, outcome.tier, outcome.detail)
        self._add("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)", *values, outcome.latency_ns)

    def record_samples(self, samples: Iterable[Sample]) -> None:
        for s in samples:
            values = (s.at_ns, s.series.value, s.tenant, s.key, s.value_bytes)
            self._add("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", *values)

    def flush(self) -> bool:
        """Write what waits, in one transaction. False: the disk refused; it waits on, is logged once and counted."""
        if not self._waiting:
            return True
        try:
            self._commit(())
        except sqlite3.Error as error:
            if not self._refused:
                log.warning("journal_write_failed", path=str(self.path), error=error, waiting_rows=len(self._waiting))
            self._refused = True
            self._connection_rollback()
            excess = len(self._waiting) - WAITING_ROWS
            if excess > 0:
                del self._waiting[:excess]
                self.lost_rows_count += excess
            return False
        self._refused = False
        self._flush_count += 1
        if self._flush_count % _TRIM_EVERY == 0:
            self._trim()
        return True

    # -- what is held back

    def take(self, holds: Sequence[Hold]) -> tuple[Hold, ...]:
        """Commit the holds, and what waits, before anything is done. Raises JournalError; then do not do it."""
        try:
            first = self._next_hold_id()
            numbered = tuple(replace(h, id=first + i) for i, h in enumerate(holds))
            self._commit(
                (
                    "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (h.id, self._run, h.kind.value, h.cause.value, h.target, h.expires_ns, codec.dumps(h)),
                )
                for h in numbered
            )
        except sqlite3.Error as error:
            self._connection_rollback()
            raise unusable(self.path, error) from error
        return numbered

    def extend(self, hold: Hold, expires_ns: int) -> Hold:
        extended = replace(hold, expires_ns=expires_ns)
        self._hold_statement(
            "UPDATE holds SET expires_ns = ?, body = ? WHERE id = ?", (expires_ns, codec.dumps(extended), hold.id)
        )
        return extended

    def clear(self, holds: Iterable[Hold]) -> None:
        ids = [str(h.id) for h in holds if h.id is not None]
        if ids:
            self._hold_statement(f"DELETE FROM holds WHERE id IN ({','.join(ids)})", ())

    def held(self) -> tuple[Hold, ...]:
        """Every hold on record, an earlier run's too."""
        try:
            rows = self._connection.execute("SELECT body FROM holds ORDER BY id").fetchall()
        except sqlite3.Error as error:
            raise unusable(self.path, error) from error
        return tuple(codec.loads(Hold, body) for (body,) in rows)

    # -- inside

    def _add(self, statement: str, *values: object) -> None:
        self._waiting.append((statement, (self._run, *values)))
        if len(self._waiting) >= BATCH_ROWS and not self._refused:
            self.flush()

    def _commit(self, more: Iterable[tuple[str, tuple[object, ...]]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        for statement, values in (*self._waiting, *more):
            self._connection.execute(statement, values)
        self._connection.execute("COMMIT")
        self._waiting.clear()

    def _hold_statement(self, statement: str, values: tuple[int | str | None, ...]) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise unusable(self.path, error) from error

    def _next_hold_id(self) -> int:
        (highest,) = self._connection.execute("SELECT coalesce(max(id), 0) FROM holds").fetchone()
        return int(highest) + 1

    def _connection_rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # nothing was begun, or the file is beyond help: counted already
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _trim(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # a longer journal is no reason to stop; flush() reports the disk
            for table, limit in ROW_LIMITS.items():
                self._connection.execute(
                    f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", (limit,)
                )

    def _turn_started(self, event: TurnStarted) -> None:
        turn = Turn(
            event.engine, event.session, event.turn, event.prompt_tokens, event.cached_tokens, started_ns=event.at_ns
        )
        self._turns[event.engine, event.turn] = turn
        while len(self._turns) > BATCH_ROWS:  # an engine that went away never ends its turns
            self._turns.pop(next(iter(self._turns)))
        self._add_turn(turn)

    def _turn_ended(self, event: TurnEnded) -> None:
        begun = self._turns.pop((event.engine, event.turn), None)
        self._add_turn(
            Turn(
                event.engine,
                event.session,
                event.turn,
                event.prompt_tokens,
                event.cached_tokens,
                started_ns=begun.started_ns if begun is not None else None,
                ended_ns=event.at_ns,
                finish_reason=event.finish_reason,
                recomputed_tokens=event.recomputed_tokens,
                output_tokens=event.output_tokens,
                ttft_ns=event.ttft_ns,
                queued_ns=event.queued_ns,
                cost=event.cost,
            )
        )

    def _add_turn(self, turn: Turn) -> None:
        values = (turn.engine, turn.session, turn.turn, turn.started_ns, turn.ended_ns, codec.dumps(turn))
        self._add("INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?, ?, ?, ?)", *values)


def clear_holds(path: Path, holds: Iterable[Hold]) -> None:
    """Strike holds out of a journal whose daemon is gone. Raises JournalError."""
    connection = connect(path, readonly=False)
    try:
        connection.executemany("DELETE FROM holds WHERE id = ?", [(h.id,) for h in holds])
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    finally:
        connection.close()


def lock_path(journal: Path) -> Path:
    return journal.with_name(journal.name + ".lock")


def acquire_lock(journal: Path, pid: int) -> int:
    """Take the writer's lock and write our pid into it; answers the descriptor. Raises JournalError if it is taken."""
    path = lock_path(journal)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}: give a directory that is yours to write") from error
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < deadline:  # a guardian may be looking at it, see lock_holder
                time.sleep(_LOCK_PATIENCE_S / 10)
                continue
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(descriptor)
            raise JournalError(
                f"{journal}: in use by another daemon (pid {holder}): stop it, or give another path"
            ) from error
        break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{pid}\n".encode("ascii"), 0)
    return descriptor


def lock_holder(journal: Path) -> int | None:
    """The pid of the daemon that holds the lock now; None: nobody does."""
    try:
        descriptor = os.open(lock_path(journal), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # never locked, or not ours to look at: then nobody we could know of
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(descriptor)
    return None
