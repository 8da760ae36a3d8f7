"""What the daemon said, held against what the agents wrote down: calls one to one, and every process's role.

Pure. A row of the daemon is of the thing whose pid its root has, else of the call whose mark its command has. The first
row of a call that runs in the call's time is the call; a further one splits it; a row of anything else is invented; a
call without a row is merged where another row of its agent covers its time, else missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from equipoise.tests.agents.mix.plan import MARK, Step

EARLY_NS = 20_000_000
"""The agent reads its clock before it forks; a command line's time is that of its writing."""
LATE_NS = 400_000_000
"""How much later than its agent the daemon may see a call begin or end, on a machine that does other work too."""


@dataclass(frozen=True, slots=True)
class Thing:
    """What an agent wrote down. Times: CLOCK_MONOTONIC, ns."""

    agent: str
    role: str
    number: int
    """In the plan; 0: its runtime, or a shell."""
    pid: int
    """0: a shell started it."""
    began_ns: int
    ended_ns: int | None
    code: int | None


@dataclass(frozen=True, slots=True)
class Said:
    """A row of the daemon's list of tool calls."""

    agent: str
    pid: int
    command: str
    start_ns: int
    end_ns: int | None
    code: int | None
    signal: int | None
    escaped_count: int
    call_id: str
    in_shell: bool = False


@dataclass(slots=True)
class Score:
    """Of one run. `open_*`: of what nobody can tell from outside the conversation, which the ratios leave out."""

    calls: int = 0
    right: int = 0
    rows: int = 0
    """That the daemon shows as calls, without those of `open_rows`."""
    missed: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Found, with a boundary, an exit code, an end or an id that is not the truth."""
    open_calls: int = 0
    open_found: int = 0
    open_rows: int = 0
    roles: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Truth, and what the daemon took it for."""
    begins_late_ns: list[int] = field(default_factory=list)
    ends_late_ns: list[int] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return self.right / self.rows if self.rows else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.calls if self.calls else 1.0

    def check_integrity(self) -> None:
        assert self.right + len(self.missed) + len(self.merged) == self.calls
        assert self.right + len(self.split) + len(self.invented) == self.rows


def score(
    steps: Mapping[int, Step], things: Sequence[Thing], said: Sequence[Said], roles: Mapping[int, str], *, heard: bool
) -> Score:
    """`roles`: what the daemon last took each pid for. `heard`: it was told the conversations."""
    result = Score()
    by_pid = {(t.agent, t.pid): t for t in things if t.pid}
    by_number = {t.number: t for t in things if t.number}
    found: dict[int, Said] = {}
    for row in sorted(said, key=lambda r: r.start_ns):
        thing = by_pid.get((row.agent, row.pid))
        marks = MARK.findall(row.command)
        if thing is None and marks:
            thing = by_number.get(int(marks[0]))
        step = steps.get(thing.number) if thing is not None else None
        undecidable = step is not None and bool(step.open) and not heard
        if thing is None or thing.role != "tool call":
            if undecidable:
                result.open_rows += 1
            else:
                result.invented.append(f"{row.agent}: {row.command[:90]!r}")
        elif thing.number in found:
            result.split.append(f"{thing.number} {_how(steps, thing)}: {row.command[:90]!r}")
        else:
            found[thing.number] = row
    for thing in things:
        if thing.role != "tool call":
            continue
        step = steps[thing.number]
        row_of = found.get(thing.number)
        if step.open and not heard:
            result.open_calls += 1
            result.open_found += row_of is not None
            if row_of is not None:
                result.open_rows += 1
            continue
        result.calls += 1
        if row_of is not None:
            result.right += 1
            result.wrong += _wrong(thing, step, row_of, result, heard=heard)
        else:
            covered = any(
                r.agent == thing.agent and r.in_shell and r.start_ns < thing.began_ns
                and (r.end_ns is None or r.end_ns > thing.began_ns + EARLY_NS) for r in said
            )  # fmt: skip
            where = result.merged if covered else result.missed
            where.append(f"{thing.number} {_how(steps, thing)}: {step.text[:60]!r}")
    result.rows = result.right + len(result.split) + len(result.invented)
    shown = {(row.agent, row.pid) for row in said}
    for thing in things:
        if thing.pid:
            as_call = (thing.agent, thing.pid) in shown or (thing.role == "tool call" and thing.number in found)
            result.roles[thing.role, "tool call" if as_call else roles.get(thing.pid, "nothing")] += 1
        elif thing.role == "tool call":
            result.roles["line of a shell", "tool call" if thing.number in found else "nothing"] += 1
    result.check_integrity()
    return result


def _how(steps: Mapping[int, Step], thing: Thing) -> str:
    return f"({thing.agent}, {steps[thing.number].how})"


def _wrong(thing: Thing, step: Step, row: Said, result: Score, *, heard: bool) -> list[str]:
    name = f"{thing.number} {thing.agent} ({step.how}, {step.text[:40]!r})"
    assert thing.ended_ns is not None
    told = []
    if row.end_ns is None:
        return [f"{name}: not ended"]
    by_turns = row.pid == 0  # a line of builtins, known by its conversation: its turns say when
    late, after = row.start_ns - thing.began_ns, row.end_ns - thing.ended_ns
    if not by_turns:
        result.begins_late_ns.append(late)
        result.ends_late_ns.append(after)
    if not -EARLY_NS <= late <= LATE_NS and not by_turns:
        told.append(f"{name}: begins {late / 1e6:.0f} ms late")
    if not row.start_ns <= row.end_ns or (not (step.leaves or after <= LATE_NS) and not by_turns):
        told.append(f"{name}: ends {after / 1e6:.0f} ms late")
    if step.killed and row.signal != 9:
        told.append(f"{name}: was killed, said to have ended with {row.code}")
    if not step.how.startswith("shell ") and step.code is not None and row.code != step.code:
        told.append(f"{name}: exit code {row.code}, not {step.code}")
    if step.leaves and not row.escaped_count:
        told.append(f"{name}: nothing left behind")
    if heard and row.call_id != f"call-{thing.number}" and step.how != "wrapper":
        told.append(f"{name}: its conversation's id is said to be {row.call_id!r}")
    return told


def table(result: Score) -> str:
    """For people."""
    roles = sorted({told for _, told in result.roles} | {"tool call"})
    truths = sorted({truth for truth, _ in result.roles})
    lines = [f"{'is':<16}" + "".join(f"{'as ' + role:>17}" for role in roles)]
    for truth in truths:
        lines.append(f"{truth:<16}" + "".join(f"{result.roles[truth, role] or '':>17}" for role in roles))
    lines.append(
        f"calls {result.calls}, right {result.right}, missed {len(result.missed)}, merged {len(result.merged)}, "
        f"split {len(result.split)}, invented {len(result.invented)}, with something wrong {len(result.wrong)}"
    )
    lines.append(f"precision {result.precision:.4f}, recall {result.recall:.4f}")
    if result.open_calls or result.open_rows:
        lines.append(
            f"not to be told from outside: {result.open_calls} calls, of which {result.open_found} were found, "
            f"and {result.open_rows - result.open_found} rows of the agent's own programs"
        )
    for name, late in (("begins", result.begins_late_ns), ("ends", result.ends_late_ns)):
        ordered = sorted(late)
        if ordered:
            middle, most = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
            lines.append(f"{name} later than its agent says: p50 {middle / 1e6:.1f} ms, p99 {most / 1e6:.1f} ms")
    for what in ("missed", "merged", "split", "invented", "wrong"):
        lines += [f"  {what}: {each}" for each in getattr(result, what)]
    return "\n".join(lines)
