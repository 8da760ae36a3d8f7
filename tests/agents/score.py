"""How well the daemon tells tool calls from everything else an agent starts, held against what the model asked for.

Pure: the truth and what was said in, a score out. Owns the matching. A row of the daemon belongs to an asked-for call
if it began between the asking and the result and its command has the call's text in it (shells wrap and quote it, the
kernel copies only its beginning); where the command shows a wrapper alone, time decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

MIB = 1 << 20
SLACK_NS = 20_000_000
"""The model's clock is read a little after its answer has left; a process can begin before that."""
_QUOTING = re.compile(r"""['"\\\s]|…""")
_WRAPPERS = ("--codex-run-as-process-setup", "__CODEX_SNAPSHOT_OVERRIDE")
"""Commands whose text lies behind what the kernel copies."""
_LEAST = 8
"""Characters of a text that must be seen where its command is cut short."""


class Truth(Enum):
    """What a row of the daemon really is."""

    CALL = "tool call"
    AGAIN = "call, again"
    """A second row for a call that has one."""
    RUNTIME = "agent itself"
    START_UP = "start-up"
    """Before the first tool call was asked for."""
    HOUSEKEEPING = "housekeeping"
    MISSED = "(missed)"
    """Asked for, and no row shows it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A tool call that the model asked for. Times: CLOCK_MONOTONIC, ns."""

    number: int
    text: str
    asked_ns: int
    answered_ns: int | None
    exit_code: int = 0
    peak_bytes: int = 0
    """The least it held; 0: no claim."""
    leaves_behind: bool = False
    call_id: str = ""
    """By which the conversation knows it; "": no claim."""
    id_known: bool = False
    """The daemon must have it; else it may be without one, but not have another's."""
    session: str = ""
    """Of its conversation; "": no claim."""
    pid: int | None = None
    """Its process, where its result tells; None: not known."""


@dataclass(frozen=True, slots=True)
class Said:
    """A row of the daemon's list."""

    id: str
    pid: int
    command: str
    start_ns: int
    end_ns: int | None = None
    role: str = "tool call"
    """What the daemon takes it for."""
    exit_code: int | None = None
    peak_bytes: int = 0
    escaped_count: int = 0
    actions: tuple[str, ...] = ()
    call_id: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of the daemon was said to be, and is."""

    said: Said
    truth: Truth
    call: int | None = None


@dataclass(slots=True)
class Score:
    """One run of one agent."""

    rows: list[Row]
    missed: list[int]
    """Numbers of the calls that no row shows."""
    asked_count: int
    survived: bool
    wrong: list[str] = field(default_factory=list)
    """Calls that were found, with something measured wrong."""

    @property
    def precision(self) -> float:
        """Of what was shown as a tool call, how much is one. 1 where nothing was shown."""
        shown = [row for row in self.rows if row.said.role == "tool call"]
        return sum(row.truth is Truth.CALL for row in shown) / len(shown) if shown else 1.0

    @property
    def recall(self) -> float:
        """Of what was asked for, how much is shown as a tool call."""
        found = {row.call for row in self.rows if row.truth is Truth.CALL and row.said.role == "tool call"}
        return len(found) / self.asked_count if self.asked_count else 1.0

    @property
    def perfect(self) -> bool:
        return self.survived and self.precision == self.recall == 1.0 and not self.wrong

    def confusion(self) -> Counter[tuple[Truth, str]]:
        """Count by what it is and what it was said to be."""
        counts = Counter((row.truth, row.said.role) for row in self.rows)
        if self.missed:
            counts[Truth.MISSED, "nothing"] = len(self.missed)
        return counts

    def check_integrity(self) -> None:
        """Every call is either found once or missed."""
        found = [row.call for row in self.rows if row.truth is Truth.CALL]
        assert len(found) == len(set(found)) and len(found) + len(self.missed) == self.asked_count


def score(asked: Sequence[Asked], said: Iterable[Said], agent_pids: Iterable[int], survived: bool) -> Score:
    """`agent_pids`: the runtime and all its ancestors, whoever of them the daemon may show."""
    agent = set(agent_pids)
    rows: list[Row] = []
    found: dict[int, Row] = {}
    first_ns = min((call.asked_ns for call in asked), default=None)
    for one in sorted(said, key=lambda row: row.start_ns):
        call = None if one.pid in agent else _call_of(one, asked, found)
        if one.pid in agent:
            row = Row(one, Truth.RUNTIME)
        elif call is None:
            early = first_ns is None or one.start_ns < first_ns - SLACK_NS
            row = Row(one, Truth.START_UP if early else Truth.HOUSEKEEPING)
        elif call.number in found:
            row = Row(one, Truth.AGAIN, call.number)
        else:
            row = found[call.number] = Row(one, Truth.CALL, call.number)
        rows.append(row)
    missed = [call.number for call in asked if call.number not in found]
    wrong = [why for call in asked if call.number in found for why in _wrong(call, found[call.number].said)]
    result = Score(rows, missed, len(asked), survived, wrong)
    result.check_integrity()
    return result


def _call_of(said: Said, asked: Sequence[Asked], found: dict[int, Row]) -> Asked | None:
    """The call that this row is of: of those in whose time it began and whose text it has, the first not yet found."""
    around = [
        call
        for call in asked
        if call.asked_ns - SLACK_NS <= said.start_ns and (call.answered_ns is None or said.start_ns <= call.answered_ns)
    ]
    fitting = [call for call in around if _has_text(said.command, call.text)]
    if not fitting and any(mark in said.command for mark in _WRAPPERS):
        fitting = around
    fitting = [call for call in fitting if call.pid in (None, said.pid)]
    return next((call for call in fitting if call.number not in found), fitting[0] if fitting else None)


def _has_text(command: str, text: str) -> bool:
    """Whether the command has this text in it, or its beginning where the command was cut short."""
    cut = command.endswith("…")
    command, text = _QUOTING.sub("", command), _QUOTING.sub("", text)
    if text in command:
        return True
    least = min(_LEAST, len(text))
    return cut and any(command.endswith(text[:size]) for size in range(len(text) - 1, least - 1, -1))


def _wrong(call: Asked, said: Said) -> Iterable[str]:
    if said.end_ns is None and not call.leaves_behind:
        yield f"call {call.number}: not ended"
    elif said.exit_code != call.exit_code:
        yield f"call {call.number}: exit code {said.exit_code}, not {call.exit_code}"
    if said.peak_bytes < call.peak_bytes:
        yield f"call {call.number}: peak {said.peak_bytes // MIB} MiB, not {call.peak_bytes // MIB}"
    if call.leaves_behind and not said.escaped_count:
        yield f"call {call.number}: nothing left behind"
    if call.call_id and said.call_id != call.call_id and (said.call_id or call.id_known):
        yield f"call {call.number}: id {said.call_id!r}, not {call.call_id!r}"
    if call.session and said.session != call.session:
        yield f"call {call.number}: session {said.session!r}, not {call.session!r}"
