"""One agent under the daemon, start to end, and the score of that run.

Owns the run: the agent inside `equipoise run` under a daemon of tests/fixtures, the scripted model beside it. What it
asks of the daemon is ListToolCalls alone.
"""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.daemon.api.v1 import policy_pb2
from equipoise.tests.agents.clients import Client, prepare
from equipoise.tests.agents.drive import Ended, drive
from equipoise.tests.agents.model import Conversation, ScriptedModel
from equipoise.tests.agents.score import Asked, Said, Score, score
from equipoise.tests.agents.script import Script
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon

SETTLE_S = 1.0
"""How long after the agent's end the daemon may take to have heard of it."""
_NUMBER = itertools.count(1)

POLICY = """
apiVersion: equipoise/v1
kind: Policy
metadata: {name: agents}
spec:
  mode: enforce
  tenants: {gold: {weight: 1}}
  memory:
    toolPool: 4GiB
    budget: {soft: 64MiB, hard: 128MiB, step: 128MiB, max: 384MiB, bends: false}
    maxWait: 20s
"""
"""Room for the call of 300 MiB; none for an agent's runtime with that call on top."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one run."""

    name: str
    score: Score
    ended: Ended


def run(daemon: RunningDaemon, client: Client, folder: Path, launcher: str, script: Script) -> Trial:
    """Run one agent to its end. `folder` must not exist."""
    name = f"{client.name}-{launcher}-{next(_NUMBER)}"
    with ScriptedModel(script) as model:
        launch = prepare(client, model.url, folder, launcher)
        model.book.expect(launch.label, client.fit(script), in_words=client.in_words)
        under = [*CLI, "run", "--tenant", "gold", "--name", name, "--"]
        ended = drive(launch, under, {"EQUIPOISE_SOCKET": str(daemon.socket)}, model.all_said)
        time.sleep(SETTLE_S)
        conversations = model.conversations
    rows = [said_of(view) for view in daemon.tool_calls() if view.sandbox == name]
    pids = {pid for c in conversations for call in c.calls for pid in call.peer_pids} | {ended.pid}
    survived = ended.returncode == 0 and any(conversation.complete for conversation in conversations)
    return Trial(name, score(asked_in(conversations), rows, pids - {os.getpid()}, survived), ended)


@dataclass(frozen=True, slots=True)
class Apart:
    """What came of two conversations of one agent at once, in one sandbox."""

    name: str
    score: Score
    """Of both together."""
    sessions: tuple[frozenset[str], frozenset[str]]
    """Under which the daemon has the calls that each asked for."""
    wire: tuple[str, str]
    """What the agent calls each on the wire; "" where it does not."""
    ended: Ended

    @property
    def apart(self) -> bool:
        """Each conversation's calls are of the one session that is called as the agent calls it."""
        named = [frozenset({f"gold/{name}"}) for name in self.wire]
        return named == list(self.sessions) and named[0] != named[1]


def run_two(daemon: RunningDaemon, client: Client, folder: Path, script: Script) -> Apart:
    """Run one agent twice at once, in one sandbox: the same commands, marked by who asks. `folder` must not exist."""
    name = f"{client.name}-twice-{next(_NUMBER)}"
    sides = ("left", "right")
    with ScriptedModel(script) as model:
        launches = [prepare(client, model.url, folder / side) for side in sides]
        parts = []
        for side, launch in zip(sides, launches, strict=True):
            model.book.expect(launch.label, client.fit(script).marked(side), in_words=client.in_words)
            parts.append(f"(cd {launch.workspace} && exec {shlex.join(launch.argv)})")
        both = replace(launches[0], argv=("sh", "-c", f"{parts[0]} & one=$!; {parts[1]} & wait $one && wait $!"))
        under = [*CLI, "run", "--tenant", "gold", "--name", name, "--"]
        ended = drive(both, under, {"EQUIPOISE_SOCKET": str(daemon.socket)}, model.all_said)
        time.sleep(SETTLE_S)
        told = [next(c for c in model.conversations if launch.label in c.opening) for launch in launches]
    views = [view for view in daemon.tool_calls() if view.sandbox == name]
    agents = {pid for c in told for call in c.calls for pid in call.peer_pids} | {ended.pid}
    survived = ended.returncode == 0 and all(conversation.complete for conversation in told)
    both_score = score(asked_in(told), [said_of(view) for view in views], agents - {os.getpid()}, survived)
    left, right = (frozenset(v.session_id for v in views if f": {side}" in v.command) for side in sides)
    return Apart(name, both_score, (left, right), (told[0].session, told[1].session), ended)


def asked_in(conversations: Iterable[Conversation]) -> list[Asked]:
    calls = [call for conversation in conversations for call in conversation.calls]
    return [
        Asked(
            number=number,
            text=call.command.text,
            asked_ns=call.asked_ns,
            answered_ns=call.answered_ns,
            exit_code=call.command.exit_code,
            peak_bytes=call.command.peak_bytes,
            leaves_behind=call.command.leaves_behind,
        )
        for number, call in enumerate(calls)
    ]


def said_of(view: policy_pb2.ToolCallView) -> Said:
    """A row of ListToolCalls. Where the daemon comes to tell roles apart, this is the place that reads them."""
    return Said(
        id=view.tool_call_id,
        pid=view.pid,
        command=view.command,
        start_ns=view.start_ns,
        end_ns=view.end_ns or None,
        exit_code=view.exit_code if view.HasField("exit_code") else None,
        peak_bytes=view.peak_bytes,
        escaped_count=view.escaped_count,
        actions=tuple(view.actions),
    )
