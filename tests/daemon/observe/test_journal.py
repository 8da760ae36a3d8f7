"""The journal: what is written can be read back, and what is none of ours is one clear line.

Long for holding one file format whole: written, read back, damaged, locked, taken up by the next run.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from equipoise.daemon.enforce import freeze, stop, throttle
from equipoise.daemon.errors import JournalError
from equipoise.daemon.observe import archive
from equipoise.daemon.observe.journal import Journal, JournalReader, Loss, Sample, Series, Turn, lock_holder, schema
from equipoise.daemon.observe.journal import writer as writer_module
from equipoise.daemon.observe.journal.hold import Hold, HoldCause, HoldKind, Needs
from equipoise.daemon.sandboxes.processes import ProcessRef, boot_id
from equipoise.policies.accounting import TurnCost
from equipoise.policies.actions import (
    Action,
    Candidate,
    Decision,
    Freeze,
    Kill,
    Outcome,
    OutcomeStatus,
    SetTenantWeight,
    SwapOut,
)
from equipoise.policies.events import (
    DecisionMade,
    EventsLost,
    OutcomeObserved,
    SandboxRegistered,
    SandboxRemoved,
    SessionMoved,
    ToolCallMerged,
    TurnEnded,
    TurnStarted,
)
from equipoise.policies.model import (
    CgroupId,
    DecisionId,
    EngineId,
    FinishReason,
    KvMeanwhile,
    KvTier,
    Sandbox,
    SessionId,
    TenantId,
    ToolCall,
    ToolCallId,
    ToolCallPhase,
    ToolCallSource,
    Verdict,
)

BOOT = "boot-1"
CALL_3 = ToolCallId(3)
CALL = ToolCall(
    id=ToolCallId(2**64 - 2),
    tenant=TenantId("gold"),
    sandbox=CgroupId(7),
    session=SessionId("gold/ada"),
    command="pytest -q 'über'",
    kind="pytest",
    source=ToolCallSource.LINEAGE,
    confidence=0.9,
    start_ns=5,
    end_ns=9,
    phase=ToolCallPhase.ENDED,
    peak_bytes=1 << 40,
    exit_code=0,
    kv=KvMeanwhile(10, 0.5, 0.0, 3),
    verdict=Verdict.SWAP_HOST,
)


def decision(action: Action, name: str = "d1") -> Decision:
    return Decision(
        DecisionId(name),
        11,
        "tool pool above 0.90 for 2s",
        0.93,
        0.9,
        "of the pool",
        action,
        TenantId("gold"),
        "gold/ada pytest",
        "the pool holds 9 of 10 MiB",
        (Candidate("freeze", 1.0), Candidate("kill", 2.5)),
        trigger_ns=4,
    )


def opened(path: Path, boot: str = BOOT) -> Journal:
    return Journal.open(path, boot_id=boot, started_ns=1)


def hold(**changes: object) -> Hold:
    made = Hold(freeze.FREEZE, freeze.CAUSE, 1, 100, CALL_3, DecisionId("d1"), path="a/b")
    return replace(made, **changes)  # type: ignore[arg-type]  # the fields of Hold


def test_facts_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    sandbox = Sandbox(CgroupId(7), TenantId("gold"), "ada", "equipoise/gold/ada", SessionId("gold/ada"), None, 1)
    outcome = Outcome(DecisionId("d1"), OutcomeStatus.COMPLETED, 12, "cgroup.freeze", "", 8)
    moved = SessionMoved(
        20, EngineId("e"), SessionId("gold/ada"), KvTier.DEVICE, KvTier.HOST, 10, 2300, 5, directive="d2"
    )
    samples = (
        Sample(1, Series.SANDBOX_MEMORY, TenantId("gold"), "gold/ada", 10),
        Sample(2, Series.KV, TenantId("gold"), "host", 20),
    )
    journal.record_sandbox(sandbox)
    journal.record_tool_call(replace(CALL, end_ns=None, phase=ToolCallPhase.RUNNING))
    journal.record_tool_call(CALL)
    made = [
        decision(Freeze(CALL.id, 99)),
        decision(Kill(CALL.id, "why"), "d2"),
        decision(SwapOut(EngineId("e"), SessionId("gold/ada"), KvTier.HOST, 99), "d3"),
        decision(SetTenantWeight(EngineId("e"), TenantId("gold"), 2.0, 99), "d4"),
    ]
    for each in made:
        journal.record(DecisionMade(11, each))
    journal.record(OutcomeObserved(12, outcome))
    journal.record(moved)
    journal.record(EventsLost(13, "ring", 4))
    journal.record_samples(samples)
    assert journal.flush()
    with JournalReader(tmp_path / "j") as reader:  # while the writer lives
        assert reader.tool_calls() == (CALL,)
        assert reader.tool_call(CALL.id) == CALL
        assert reader.sandboxes() == (sandbox,)
        assert reader.decisions() == tuple(made)
        assert reader.decisions(tool_call=CALL.id) == tuple(made[:2])
        assert reader.outcomes() == reader.outcomes(decision=DecisionId("d1")) == (outcome,)
        assert reader.moves() == (moved,)
        assert reader.losses() == (Loss(13, "ring", 4),)
        assert reader.samples() == samples
    journal.close()


def test_what_lives_is_known_to_the_next_run(tmp_path: Path) -> None:
    """Of this boot: what is registered and not removed, calls that are open, ids that became others."""
    kept = Sandbox(
        CgroupId(7), TenantId("gold"), "ada", "equipoise/gold/ada", SessionId("s"), 9, 1, agent_start_ticks=5
    )
    open_call = replace(CALL, id=ToolCallId(8), end_ns=None, gone_ns=None, phase=ToolCallPhase.RUNNING)
    wrapper = replace(open_call, id=ToolCallId(9))
    journal = opened(tmp_path / "j")
    for sandbox in (kept, replace(kept, cgroup_id=CgroupId(8), name="eve")):
        journal.record(SandboxRegistered(1, sandbox))
    journal.record(SandboxRemoved(2, CgroupId(8)))
    for call in (replace(CALL, gone_ns=CALL.end_ns), open_call, wrapper):
        journal.record_tool_call(call)
    journal.record(ToolCallMerged(3, wrapper.id, open_call.id))
    journal.close()
    following = opened(tmp_path / "j")
    with JournalReader(tmp_path / "j") as reader:
        assert reader.registered(BOOT) == (kept,) and reader.open_calls(BOOT) == (open_call,)
        assert reader.merges(BOOT) == {wrapper.id: open_call.id}
        assert {c.id for c in reader.newest_calls(BOOT, 10)} == {CALL.id, open_call.id}
        assert len(reader.newest_calls(BOOT, 1)) == 1
        assert reader.last_written_ns(BOOT) == max(CALL.start_ns, open_call.start_ns)
        assert len(reader.sandboxes_of_boot(BOOT)) == 2
        assert (reader.registered("other"), reader.open_calls("other"), reader.last_written_ns("other")) == ((), (), 0)
    following.record_tool_call(replace(open_call, end_ns=99, gone_ns=99, phase=ToolCallPhase.ENDED))
    following.strike_sandbox(kept.cgroup_id)
    following.record(ToolCallMerged(99, CALL.id, open_call.id))
    following.close()
    with JournalReader(tmp_path / "j") as reader:
        assert reader.open_calls(BOOT) == () and reader.registered(BOOT) == ()
        assert [c.id for c in reader.newest_calls(BOOT, 10)] == [open_call.id], "what an earlier run took for a call"


def test_a_turn_is_one_row_from_its_start_to_its_end(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    engine, session = EngineId("e"), SessionId("s")
    journal.record(TurnStarted(5, engine, session, "t1", 100, 20))
    journal.flush()
    with JournalReader(tmp_path / "j") as reader:
        assert reader.turns() == (Turn(engine, session, "t1", 100, 20, started_ns=5),)
    cost = TurnCost(pte=80.5, wasted_pte=3.0, duration_ns=4, ideal_ns=2)
    journal.record(TurnEnded(9, engine, session, "t1", FinishReason.TOOL_CALLS, 100, 20, 3, 40, 2, 1, cost))
    journal.close()
    with JournalReader(tmp_path / "j") as reader:
        (turn,) = reader.turns()
    assert (turn.started_ns, turn.ended_ns, turn.output_tokens) == (5, 9, 40)
    assert turn.finish_reason is FinishReason.TOOL_CALLS
    assert turn.cost == cost and turn.cost.energy_joules is None


def test_a_hold_is_on_disk_before_take_returns_and_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "j"
    code = f"""
import os, signal
from pathlib import Path
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.observe.journal.hold import Hold
from equipoise.daemon.enforce import freeze, stop
from equipoise.daemon.sandboxes.processes import ProcessRef, boot_id
j = Journal.open(Path({str(path)!r}), boot_id=boot_id(), started_ns=1)
j.take([Hold(stop.STOP, freeze.CAUSE, 1, 100, process=ProcessRef(7, 8))])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with JournalReader(path) as reader:
        (found,) = reader.holds(boot_id())
        assert reader.latest_run().ended_ns is None
    assert found.process == ProcessRef(7, 8) and found.id == 1
    assert lock_holder(path) is None, "the lock died with the process"


def test_holds_can_be_extended_and_struck_out(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    first, second = journal.take([hold(), hold(path="c")])
    extended = journal.extend(first, 500)
    assert journal.held() == (extended, second) and extended.expires_ns == 500
    journal.clear([first])
    assert journal.held() == (second,)
    journal.close()


HELD_BY_AN_EARLIER_VERSION = {
    '{"type":"Hold","kind":"memory.high","cause":"throttle","at_ns":1,"expires_ns":100,"tool_call":3,"decision":"d1",'
    '"path":"a/b","process":null,"restore":"max","id":1}': Hold(
        throttle.MEMORY_HIGH, throttle.CAUSE, 1, 100, CALL_3, DecisionId("d1"), "a/b", restore="max", id=1
    ),
    '{"type":"Hold","kind":"cpu quota","cause":"throttle","at_ns":1,"expires_ns":100,"tool_call":3,"decision":"d1",'
    '"path":"a/b","process":null,"restore":"max 100000","id":2}': Hold(
        throttle.CPU_QUOTA, throttle.CAUSE, 1, 100, CALL_3, DecisionId("d1"), "a/b", restore="max 100000", id=2
    ),
    '{"type":"Hold","kind":"freeze","cause":"freeze","at_ns":1,"expires_ns":100,"tool_call":3,"decision":"d1",'
    '"path":"a/b","process":null,"restore":null,"id":3}': Hold(
        freeze.FREEZE, freeze.CAUSE, 1, 100, CALL_3, DecisionId("d1"), "a/b", id=3
    ),
    '{"type":"Hold","kind":"stop","cause":"budget","at_ns":1,"expires_ns":100,"tool_call":3,"decision":null,'
    '"path":null,"process":{"type":"ProcessRef","pid":7,"start_ticks":8},"restore":null,"id":4}': Hold(
        stop.STOP, HoldCause.BUDGET, 1, 100, CALL_3, process=ProcessRef(7, 8), id=4
    ),
    '{"type":"Hold","kind":"armed","cause":"budget","at_ns":1,"expires_ns":null,"tool_call":null,"decision":null,'
    '"path":"a","process":null,"restore":null,"id":5}': Hold(HoldKind.ARMED, HoldCause.BUDGET, 1, None, path="a", id=5),
}


def test_holds_that_an_earlier_version_wrote_are_read_and_written_the_same(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    taken = journal.take([replace(h, id=None) for h in HELD_BY_AN_EARLIER_VERSION.values()])
    assert journal.held() == taken == tuple(HELD_BY_AN_EARLIER_VERSION.values())
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as plain:
        rows = plain.execute("SELECT kind, cause, target, expires_ns, body FROM holds ORDER BY id").fetchall()
    assert [row[:4] for row in rows] == [
        ("memory.high", "throttle", "a/b", 100),
        ("cpu quota", "throttle", "a/b", 100),
        ("freeze", "freeze", "a/b", 100),
        ("stop", "budget", "pid 7", 100),
        ("armed", "budget", "a", None),
    ]
    assert [row[4] for row in rows] == list(HELD_BY_AN_EARLIER_VERSION)
    journal.close()


def test_the_journal_keeps_kinds_and_causes_that_it_never_heard_of(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    (taken,) = journal.take([hold(kind=HoldKind("pinned", Needs(restore=True)), cause=HoldCause("pin"), restore="0-7")])
    with JournalReader(tmp_path / "j") as reader:
        (found,) = reader.holds(BOOT)
    assert found == taken and (found.kind.value, found.cause.value, found.restore) == ("pinned", "pin", "0-7")
    journal.close()


def test_holds_of_another_boot_are_void_and_of_this_boot_are_not(tmp_path: Path) -> None:
    first = opened(tmp_path / "j")
    (kept,) = first.take([hold()])
    first.close()
    second = opened(tmp_path / "j")
    assert second.held() == (kept,)
    second.close()
    third = opened(tmp_path / "j", boot="boot-2")
    assert third.held() == ()
    third.close()


def test_answers_are_about_the_latest_run_unless_one_is_named(tmp_path: Path) -> None:
    first = opened(tmp_path / "j")
    first.record_tool_call(CALL)
    first.close(ended_ns=50)
    opened(tmp_path / "j").close()
    with JournalReader(tmp_path / "j") as reader:
        runs = reader.runs()
        assert [r.ended_ns for r in runs] == [50, None]
        assert reader.tool_calls() == ()
        assert reader.tool_calls(runs[0].id) == (CALL,)
        assert reader.tool_call(CALL.id) == CALL


def test_a_second_daemon_is_told_who_has_the_journal(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    assert lock_holder(tmp_path / "j") == os.getpid()
    with pytest.raises(JournalError, match=rf"in use by another daemon \(pid {os.getpid()}\)"):
        opened(tmp_path / "j")
    journal.close()
    opened(tmp_path / "j").close()


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"GGUF" * 4096)
    for attempt in (lambda: opened(tmp_path / "j"), lambda: JournalReader(tmp_path / "j")):
        with pytest.raises(JournalError, match="damaged or not a journal") as caught:
            attempt()
        assert "\n" not in str(caught.value) and "move it away" in str(caught.value)
    assert (tmp_path / "j").read_bytes() == b"GGUF" * 4096, "and it is left as it was"
    assert lock_holder(tmp_path / "j") is None


def test_somebody_elses_database_is_refused_and_untouched(tmp_path: Path) -> None:
    theirs = sqlite3.connect(tmp_path / "j")
    theirs.execute("CREATE TABLE photos (name TEXT)")
    theirs.commit()
    theirs.close()
    for attempt in (lambda: opened(tmp_path / "j"), lambda: JournalReader(tmp_path / "j")):
        with pytest.raises(JournalError, match="not a journal of Equipoise"):
            attempt()
    again = sqlite3.connect(tmp_path / "j")
    assert [row[0] for row in again.execute("SELECT name FROM sqlite_master")] == ["photos"]
    again.close()


def test_a_journal_cut_short_is_one_clear_line(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    for number in range(2000):
        journal.record_outcome(Outcome(DecisionId(f"d{number}"), OutcomeStatus.COMPLETED, number, "x" * 50))
    journal.close()
    os.truncate(tmp_path / "j", 3 * 4096)
    with pytest.raises(JournalError, match="damaged"), JournalReader(tmp_path / "j") as reader:
        reader.outcomes()


def test_a_journal_of_a_later_version_says_so(tmp_path: Path) -> None:
    opened(tmp_path / "j").close()
    later = sqlite3.connect(tmp_path / "j")
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(JournalError, match="schema 99"):
        opened(tmp_path / "j")


def test_a_missing_journal_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there: start the daemon"):
        JournalReader(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="give a directory that is yours to write"):
        opened(tmp_path / "file" / "j")


def test_a_dead_daemons_journal_is_read_where_nothing_may_be_written() -> None:
    # Not under tmp_path, which is closed to other users.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = opened(folder / "j")
        journal.record_tool_call(CALL)
        journal.close()
        code = f"""
import os
from pathlib import Path
from equipoise.daemon.observe.journal import JournalReader
if os.geteuid() == 0:
    os.setuid(65534)
print(len(JournalReader(Path({str(folder / "j")!r})).tool_calls()))
"""
        (folder / "j").chmod(0o444)
        folder.chmod(0o555)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        folder.chmod(0o755)
    assert ran.stdout == "1\n", ran.stderr


def test_when_the_disk_refuses_observations_wait_and_holds_are_refused(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    journal._connection.execute("PRAGMA max_page_count = 1")  # the file may not grow: SQLITE_FULL, as a full disk gives
    journal.record_outcome(Outcome(DecisionId("d1"), OutcomeStatus.COMPLETED, 1, "x" * 9000))
    assert not journal.flush()
    with pytest.raises(JournalError, match="free space"):
        journal.take([hold()])
    journal._connection.execute("PRAGMA max_page_count = 100000")
    assert journal.flush()
    journal.close()
    with JournalReader(tmp_path / "j") as reader:
        assert len(reader.outcomes()) == 1, "what waited was written once there was room"
        assert reader.holds(BOOT) == ()


def test_what_waits_for_a_full_disk_is_bounded_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "WAITING_ROWS", 10)
    journal = opened(tmp_path / "j")
    journal._connection.execute("PRAGMA max_page_count = 1")
    for number in range(25):
        journal.record_outcome(Outcome(DecisionId(f"d{number}"), OutcomeStatus.COMPLETED, number, "x" * 9000))
    assert not journal.flush()
    assert journal.lost_rows_count == 15
    journal._connection.execute("PRAGMA max_page_count = 100000")
    journal.close()
    with JournalReader(tmp_path / "j") as reader:
        assert [o.at_ns for o in reader.outcomes()] == list(range(15, 25)), "the newest were kept"


def test_samples_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.ROW_LIMITS, "samples", 100)
    journal = opened(tmp_path / "j")
    for number in range(1000):
        journal.record_samples([Sample(number, Series.KV, TenantId("gold"), "host", 1)])
        if number % 5 == 0:
            journal.flush()
    journal.close()
    with JournalReader(tmp_path / "j") as reader:
        kept = reader.samples()
    assert kept[-1].at_ns == 999 and 100 <= len(kept) <= 100 + 64 * 5


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_ns": None},
        {"kind": HoldKind.ARMED},
        {"process": ProcessRef(1, 2)},
        {"kind": stop.STOP},
        {"kind": throttle.MEMORY_HIGH},
        {"restore": "max"},
    ],
)
def test_a_hold_that_could_not_be_undone_from_its_record_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a hold of kind"):
        hold(**changes)


# -- what was decided under earlier runs and boots


def test_decisions_of_every_run_and_boot_are_found_newest_first_with_their_last_outcome(tmp_path):
    path = tmp_path / "journal.sqlite"
    for boot, name, at_ns in (("boot-0", "d1", 50), ("boot-1", "d2", 7), ("boot-1", "d3", 9)):
        with contextlib.closing(opened(path, boot)) as journal:
            journal.record_decision(replace(decision(Kill(CALL.id, "too large"), name), at_ns=at_ns))
            for status in (OutcomeStatus.ACCEPTED, OutcomeStatus.COMPLETED):
                journal.record_outcome(Outcome(DecisionId(name), status, at_ns + 1, "signal"))
            journal.record_tool_call(CALL)
    found = archive.find(path, 10)
    assert [past.decision.id for past in found] == ["d3", "d2", "d1"]
    assert {past.outcome.status for past in found if past.outcome} == {OutcomeStatus.COMPLETED}
    assert len(archive.find(path, 2)) == 2
    assert [past.decision.id for past in archive.find(path, 9, decision="d2")] == ["d2"]
    assert len(archive.find(path, 9, tool_call=CALL.id, tenant="gold")) == 3
    assert archive.find(path, 9, tool_call=CALL_3) == archive.find(path, 9, session="x") == []
    assert archive.calls_ending(path, "fffe") == [CALL.id] and archive.calls_ending(path, "FFFF") == [CALL.id]
    assert archive.calls_ending(path, "%") == archive.calls_ending(path, "") == []


def test_the_wall_clock_of_a_decision_is_that_of_its_own_boot(tmp_path):
    path = tmp_path / "journal.sqlite"
    with contextlib.closing(opened(path)) as journal:
        journal.record_decision(decision(Kill(CALL.id, "too large")))
    (past,) = archive.find(path, 1)
    assert past.at_unix_ns == past.run.started_unix_ns + 10, "11 ns into a boot of which the run began at 1"
