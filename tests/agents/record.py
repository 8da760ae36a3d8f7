"""`python -m equipoise.tests.agents.record AGENT...`: what an agent starts, beside what the model asked for, as text.

Owns the roles as they are seen afterwards (trace.py's processes, model.py's calls) and the printing: one line an exec,
`seconds pid ppid pgid sid role [birth, life, end] path argv`. For eyes that write rules; nothing is scored here.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from equipoise.tests.agents import trace
from equipoise.tests.agents.clients import CLIENTS, LAUNCHERS, Client, prepare
from equipoise.tests.agents.drive import drive
from equipoise.tests.agents.model import AskedCall, Conversation, ScriptedModel
from equipoise.tests.agents.script import SCRIPTS, Script
from equipoise.tests.agents.trace import Exec, Process

_TELLING = re.compile(
    r"claude|codex|opencode|gemini|agent|session|thread|tool_?call|conversation|^SHLVL$|^OLDPWD$|PAGER$|CI$|^npm_command",
    re.IGNORECASE,
)
"""Keys of the environment that are worth a line."""
_QUOTING = re.compile(r"['\"\\\s]")
_ARGUMENT_CHARACTERS = 1500


def record(client: Client, launcher: str, script: Script, folder: Path) -> str:
    """Run it without our daemon, under strace; the text. `folder` must not exist."""
    output = folder.with_suffix(".strace")
    with ScriptedModel(script) as model:
        launch = prepare(client, model.url, folder, launcher)
        model.book.expect(launch.label, client.fit(script), in_words=client.in_words)
        ended = drive(launch, trace.command(output), until=model.all_said)
        processes, port, conversations = trace.read(output), model.port, model.conversations
    head = [f"# {' '.join(launch.argv)}", f"# exit {ended.returncode} after {ended.took_s:.1f} s under strace"]
    head += [f"# wire ids {key}: {sorted(values)[0][:200]}" for c in conversations for key, values in c.wire.items()]
    return "\n".join([*head, *Telling(processes, conversations, port).lines()]) + "\n"


class Telling:
    """One recording and its conversations, as lines."""

    def __init__(self, processes: Sequence[Process], conversations: Sequence[Conversation], port: int) -> None:
        self._processes = processes
        self._calls = [call for conversation in conversations for call in conversation.calls]
        self._port = port
        self._start_ns = processes[0].born_ns if processes else 0
        self._first_ask_ns = min((call.asked_ns for call in self._calls), default=1 << 62)
        self._parents = _parents(processes)
        self._runtimes = {id(p) for p in processes if any(port == self._port for _, port in p.ports)}
        self._above: set[int] = set()
        for process in processes:
            if id(process) in self._runtimes:
                self._above.update(id(above) for above in self._line_of(process))
        self._below: dict[int, str] = {}
        """Role that a process hands down, by its identity."""

    def lines(self) -> list[str]:
        """In the order of time."""
        timed = [*self._told_by_the_model(), *self._told_by_the_kernel()]
        return [f"{(at_ns - self._start_ns) / 1e9:8.3f} {text}" for at_ns, text in sorted(timed, key=lambda t: t[0])]

    def _told_by_the_model(self) -> Iterator[tuple[int, str]]:
        for call in self._calls:
            yield call.asked_ns, f"------ MODEL asks  {call.number} {call.command.name}: {call.command.text!r}"
            if call.answered_ns:
                yield call.answered_ns, f"------ MODEL told  {call.number}: {call.result[:80]!r}"

    def _told_by_the_kernel(self) -> Iterator[tuple[int, str]]:
        for process in self._processes:
            parent = self._parents.get(id(process))
            if parent is not None and id(parent) in self._below:
                self._below[id(process)] = self._below[id(parent)]
            life = (
                f"{(process.ended_ns - process.born_ns) / 1e6:.0f} ms, {process.end}" if process.ended_ns else "stays"
            )
            before = _environment_at(parent, process.born_ns)
            if not process.execs:
                role = self._below.get(id(process), "")
                yield process.born_ns, _line(process, role, f"[{process.how}, {life}] (no exec)")
            for number, one in enumerate(process.execs):
                role = self._role(process, one)
                birth = process.how if number == 0 else "same pid"
                text = _line(one, role, f"[{birth}, {life}] {one.path} {_words(one.argv)!r}")
                yield one.at_ns, text + _changes(before, one.environment)
                before = one.environment
            for at_ns, port in process.ports:
                if port == self._port:
                    yield at_ns, f"{process.pid:6d} connects to the model"

    def _role(self, process: Process, one: Exec) -> str:
        if id(process) in self._runtimes:
            return "RUNTIME" if one is process.execs[-1] else "launcher, exec'd over"
        if id(process) in self._above:
            return "launcher"
        call = self._call_of(one)
        if handed := self._below.get(id(process)):
            return f"{handed}{' =text' if call is not None else ''}"
        if call is not None:
            self._below[id(process)] = f"in call {call.number}"
            return f"** CALL {call.number} {call.command.name}"
        role = "start-up" if one.at_ns < self._first_ask_ns else "housekeeping"
        self._below[id(process)] = f"  below {role}"
        return role

    def _call_of(self, one: Exec) -> AskedCall | None:
        said = _QUOTING.sub("", " ".join(one.argv))
        for call in self._calls:
            in_time = call.asked_ns <= one.at_ns and (call.answered_ns is None or one.at_ns <= call.answered_ns)
            if in_time and _QUOTING.sub("", call.command.text) in said:
                return call
        return None

    def _line_of(self, process: Process) -> Iterator[Process]:
        above = self._parents.get(id(process))
        while above is not None:
            yield above
            above = self._parents.get(id(above))


def _parents(processes: Sequence[Process]) -> dict[int, Process]:
    """By identity: a pid may come twice."""
    newest: dict[int, Process] = {}
    parents = {}
    for process in processes:
        if process.ppid in newest:
            parents[id(process)] = newest[process.ppid]
        newest[process.pid] = process
    return parents


def _environment_at(process: Process | None, at_ns: int) -> Mapping[str, str]:
    """What a child forked at that time inherits, as far as an exec has shown it."""
    execs = [one for one in process.execs if one.at_ns <= at_ns] if process is not None else []
    return execs[-1].environment if execs else {}


def _line(what: Process | Exec, role: str, text: str) -> str:
    return f"{what.pid:6d} {what.ppid:6d} {what.pgid:6d} {what.sid:6d}  {role:24} {text}"


def _words(argv: Sequence[str]) -> list[str]:
    """Long ones lose their middle: the command stands at the end."""
    half = _ARGUMENT_CHARACTERS // 2
    return [word if len(word) <= 2 * half else f"{word[:half]} ...[{len(word)}]... {word[-half:]}" for word in argv]


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    new = {k: v[:120] for k, v in after.items() if _TELLING.search(k) and before.get(k) != v}
    gone = sorted(k for k in before if _TELLING.search(k) and k not in after)
    return (f"\n{'':39}env+ {new}" if new else "") + (f"\n{'':39}env- {gone}" if gone else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m equipoise.tests.agents.record", description=__doc__)
    parser.add_argument("agents", nargs="+", choices=CLIENTS, metavar="AGENT", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="plain")
    parser.add_argument("--script", choices=SCRIPTS, default="ten")
    options = parser.parse_args()
    for name in options.agents:
        CLIENTS[name].install()
        folder = Path(tempfile.mkdtemp(prefix="equipoise-record-")) / "run"
        sys.stdout.write(record(CLIENTS[name], options.launcher, SCRIPTS[options.script], folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
