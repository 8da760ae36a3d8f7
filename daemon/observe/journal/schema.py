"""The journal's tables, and opening a file of them.

Owns the SQL schema and the recognition of files that are none of ours. Each run of the daemon is a row of `runs`, and
every other row names its run: times are CLOCK_MONOTONIC of that run's boot. Columns are what people ask for with the
sqlite3 shell; `body` is the whole fact as JSON for programs. Ids of tool calls are text of 16 hex digits, as printed
everywhere, since SQLite's integers are signed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ...errors import JournalError

APPLICATION_ID = 0x45515053
""""EQPS" in the SQLite header: ours and nobody else's."""
SCHEMA_VERSION = 1


PATIENCE_S = 2.0
"""How long to wait for another's lock."""

SCHEMA = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, boot_id TEXT NOT NULL, pid INTEGER NOT NULL, started_ns INTEGER NOT NULL,
    started_unix_ns INTEGER NOT NULL, ended_ns INTEGER);
CREATE TABLE sandboxes (run INTEGER NOT NULL, cgroup_id INTEGER NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
    path TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (run, cgroup_id));
CREATE TABLE tool_calls (run INTEGER NOT NULL, id TEXT NOT NULL, tenant TEXT NOT NULL, sandbox INTEGER NOT NULL,
    session TEXT NOT NULL, command TEXT NOT NULL, kind TEXT NOT NULL, source TEXT NOT NULL, confidence REAL NOT NULL,
    start_ns INTEGER NOT NULL, end_ns INTEGER, peak_bytes INTEGER NOT NULL, verdict TEXT, body TEXT NOT NULL,
    PRIMARY KEY (run, id));
CREATE TABLE turns (run INTEGER NOT NULL, engine TEXT NOT NULL, session TEXT NOT NULL, turn TEXT NOT NULL,
    started_ns INTEGER, ended_ns INTEGER, body TEXT NOT NULL, PRIMARY KEY (run, engine, turn));
CREATE TABLE moves (run INTEGER NOT NULL, at_ns INTEGER NOT NULL, session TEXT NOT NULL, from_tier TEXT NOT NULL,
    to_tier TEXT NOT NULL, moved_bytes INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE decisions (run INTEGER NOT NULL, id TEXT NOT NULL, at_ns INTEGER NOT NULL, rule TEXT NOT NULL,
    action TEXT NOT NULL, tenant TEXT NOT NULL, subject TEXT NOT NULL, tool_call TEXT, session TEXT,
    body TEXT NOT NULL, PRIMARY KEY (run, id));
CREATE INDEX decisions_by_tool_call ON decisions (tool_call);
CREATE TABLE outcomes (run INTEGER NOT NULL, decision TEXT NOT NULL, at_ns INTEGER NOT NULL, status TEXT NOT NULL,
    tier TEXT NOT NULL, detail TEXT NOT NULL, latency_ns INTEGER);
CREATE INDEX outcomes_by_decision ON outcomes (decision);
CREATE TABLE samples (run INTEGER NOT NULL, at_ns INTEGER NOT NULL, series TEXT NOT NULL, tenant TEXT NOT NULL,
    key TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE losses (run INTEGER NOT NULL, at_ns INTEGER NOT NULL, source TEXT NOT NULL, count INTEGER NOT NULL);
CREATE TABLE holds (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, kind TEXT NOT NULL, cause TEXT NOT NULL,
    target TEXT NOT NULL, expires_ns INTEGER, body TEXT NOT NULL);
"""

LIVING = """
CREATE TABLE IF NOT EXISTS registered (cgroup_id INTEGER PRIMARY KEY, run INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS merges (run INTEGER NOT NULL, id TEXT NOT NULL, into_id TEXT NOT NULL,
    PRIMARY KEY (run, id));
"""
"""Added without a new schema version, as no reader of version 1 minds: which sandboxes are registered now, whichever
run did it, and which ids became another's. For the next start to take up what lives on."""

ROW_LIMITS = {
    "samples": 500_000,
    "outcomes": 200_000,
    "decisions": 200_000,
    "turns": 200_000,
    "moves": 200_000,
    "tool_calls": 200_000,
    "merges": 20_000,
    "losses": 20_000,
    "sandboxes": 50_000,
}
"""Rows kept of each table, the newest; `holds` is as long as what is held, `runs` one row a start."""


def connect(path: Path, *, readonly: bool, patience_s: float = PATIENCE_S) -> sqlite3.Connection:
    """Open a journal that exists and is ours. Raises JournalError with one clear line."""
    try:
        if readonly:
            connection = _connect_readonly(path, patience_s)
        else:
            connection = sqlite3.connect(path, patience_s, isolation_level=None)
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    try:
        application_id = _pragma(connection, "application_id")
        version = _pragma(connection, "user_version")
        empty = _pragma(connection, "schema_version") == 0
        if application_id == 0 and empty and not readonly:
            _create(connection)
        elif application_id != APPLICATION_ID:
            raise JournalError(f"{path}: not a journal of Equipoise: move it away, or give another path")
        elif version != SCHEMA_VERSION:
            raise JournalError(
                f"{path}: schema {version}, this version reads {SCHEMA_VERSION}: move it away, or give another path"
            )
        if not readonly:
            connection.executescript(LIVING)
    except sqlite3.Error as error:
        connection.close()
        raise unusable(path, error) from error
    except JournalError:
        connection.close()
        raise
    return connection


def unusable(path: Path, error: sqlite3.Error) -> JournalError:
    """The one line for what SQLite said."""
    text = str(error)
    if "not a database" in text or "malformed" in text or "corrupt" in text:
        return JournalError(f"{path}: damaged or not a journal ({text}): move it away, a new one is made")
    if "locked" in text or "busy" in text:
        return JournalError(f"{path}: locked by another process ({text}): wait for it, or end it")
    if "full" in text or "disk I/O" in text:
        return JournalError(f"{path}: {text}: free space on that file system")
    return JournalError(f"{path}: {text}: check that the directory exists and is yours to write")


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        "COMMIT;"
    )


def _connect_readonly(path: Path, patience_s: float) -> sqlite3.Connection:
    """A live or a dead daemon's journal, also where we may not write beside it.

    Reading WAL wants the -shm file. A dead daemon leaves none, and without the right to make one only `immutable`
    opens the file; then nobody writes to it either.
    """
    if not path.exists():
        raise JournalError(f"{path}: no journal there: start the daemon first, or give its path")
    for mode in ("mode=ro", "immutable=1"):
        uri = f"{path.absolute().as_uri()}?{mode}"
        connection = sqlite3.connect(uri, patience_s, uri=True, isolation_level=None)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            if mode == "mode=ro" and "locked" not in str(error):
                continue
            raise
        except sqlite3.Error:
            connection.close()
            raise
        return connection
    raise JournalError(f"{path}: cannot be read: ask for membership in the daemon's group")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
