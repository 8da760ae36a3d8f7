"""One agent under the daemon, start to end, and the score of that run.

Owns the run: the agent inside `equipoise run` under a daemon of tests/fixtures, the scripted model beside it, on
request as an engine that the daemon hears. What it asks of the daemon is ListToolCalls alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.daemon.api.v1 import policy_pb2
from equipoise.policies.model import AskedToolCall, SessionId
from equipoise.tests.agents.clients import Client, prepare
from equipoise.tests.agents.dialects import Answer
from equipoise.tests.agents.drive import Ended, drive, end_what_is_left
from equipoise.tests.agents.mix.witness import Heard
from equipoise.tests.agents.model import AskedCall, Conversation, ScriptedModel
from equipoise.tests.agents.score import Asked, Said, Score, score
from equipoise.tests.agents.script import Script
from equipoise.tests.fixtures.running_daemon import CLI, RunningDaemon

SETTLE_S = 1.0
"""How long after the agent's end the daemon may take to have heard of it."""
_NUMBER = itertools.count(1)
_SHELL = re.compile(r"\bshell (\d+)")

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


def run(
    daemon: RunningDaemon, client: Client, folder: Path, launcher: str, script: Script, *, heard: bool = False
) -> Trial:
    """Run one agent to its end. `folder` must not exist. `heard`: the model is an engine that the daemon hears."""
    name = f"{client.name}-{launcher}-{next(_NUMBER)}"
    with ScriptedModel(script) as model, hearing(daemon, model, heard=heard):
        launch = prepare(client, model.url, folder, launcher)
        model.book.expect(launch.label, client.fit(script), in_words=client.in_words)
        ended = drive(launch, under(name), {"EQUIPOISE_SOCKET": str(daemon.socket)}, model.all_said)
        time.sleep(SETTLE_S)
        conversations = model.conversations
    rows = [said_of(view) for view in daemon.tool_calls() if view.sandbox == name]
    pids = {pid for c in conversations for call in c.calls for pid in call.peer_pids} | {ended.pid}
    survived = ended.returncode == 0 and any(conversation.complete for conversation in conversations)
    told = heard and not client.in_words
    asked = asked_in(conversations, ids=told, sessions=told or client.names_session)
    return Trial(name, score(asked, rows, pids - {os.getpid()}, survived), ended)


@contextlib.contextmanager
def hearing(daemon: RunningDaemon, model: ScriptedModel, *, heard: bool) -> Iterator[None]:
    """With `heard` the daemon is told what the model is asked and answers, as by an engine of ours: by the session that
    its client names, and else by one for each text prefix."""
    if not heard:
        yield
        return
    with Heard(f"unix:{daemon.socket}", model.port) as engine:

        def turn(conversation: Conversation, answer: Answer, peer_port: int) -> None:
            asked = tuple(AskedToolCall(each.call_id, "shell", each.command) for each in answer.asks)
            engine.turn(SessionId(session_of(conversation)), ("127.0.0.1", peer_port), asked)

        model.book.on_turn = turn
        yield


def session_of(conversation: Conversation) -> str:
    """As the daemon shall know it."""
    return f"gold/{conversation.session or f'prefix-{id(conversation)}'}"


def under(name: str) -> list[str]:
    return [*CLI, "run", "--tenant", "gold", "--name", name, "--"]


@dataclass(frozen=True, slots=True)
class Apart:
    """What came of two conversations of one agent at once, in one sandbox."""

    name: str
    score: Score
    """Of both together."""
    sessions: tuple[frozenset[str], frozenset[str]]
    """Under which the daemon has the calls that each asked for."""
    expected: tuple[frozenset[str], frozenset[str]]
    """Any one of these is right for each."""
    ended: Ended

    @property
    def apart(self) -> bool:
        """Each conversation's calls are of one session, which is that conversation's."""
        right = all(len(had) == 1 and had <= of for had, of in zip(self.sessions, self.expected, strict=True))
        return right and self.sessions[0] != self.sessions[1]


def run_two(daemon: RunningDaemon, client: Client, folder: Path, script: Script, *, heard: bool = False) -> Apart:
    """Run one agent twice at once, in one sandbox, with the same commands, word for word. `folder` must not exist."""
    name = f"{client.name}-twice-{next(_NUMBER)}"
    script = script.telling()
    with ScriptedModel(script) as model, hearing(daemon, model, heard=heard):
        launches = [prepare(client, model.url, folder / side) for side in ("left", "right")]
        parts = []
        for launch in launches:
            model.book.expect(launch.label, client.fit(script), in_words=client.in_words)
            # A home for each: opencode's first two starts in one would make its database twice.
            home = shlex.quote(launch.environment["HOME"])
            parts.append(f"(cd {launch.workspace} && exec env HOME={home} {shlex.join(launch.argv)})")
        both = replace(launches[0], argv=("sh", "-c", f"{parts[0]} & one=$!; {parts[1]} & wait $one && wait $!"))
        ended = drive(both, under(name), {"EQUIPOISE_SOCKET": str(daemon.socket)}, model.all_said)
        end_what_is_left(launches[1].environment["HOME"])
        time.sleep(SETTLE_S)
        told = [c for launch in launches for c in model.conversations if launch.label in c.opening]
        assert len(told) == len(launches), f"{len(told)} conversations: {ended.output[-2000:]}"
    views = [view for view in daemon.tool_calls() if view.sandbox == name]
    agents = {pid for c in told for call in c.calls for pid in call.peer_pids} | {ended.pid}
    survived = ended.returncode == 0 and all(conversation.complete for conversation in told)
    both_score = score(asked_in(told), [said_of(view) for view in views], agents - {os.getpid()}, survived)
    both_score.wrong += [why for conversation in told for why in _wrong_ids(conversation, views, told=heard)]
    left, right = (frozenset(v.session_id for v in views if v.pid in _shells(c)) for c in told)
    if heard or client.names_session:
        expected = [frozenset({session_of(conversation)}) for conversation in told]
    else:  # the sandbox's own for the first to call, its process for the other
        expected = [frozenset({f"gold/{name}", f"gold/{name}:{c.calls[0].peer_pids[0]}"}) for c in told]
    return Apart(name, both_score, (left, right), (expected[0], expected[1]), ended)


def _shells(conversation: Conversation) -> dict[int, AskedCall]:
    """Its calls, by the process of each as its result tells (Script.telling)."""
    return {pid: call for call in conversation.calls if (pid := _shell_of(call)) is not None}


def _shell_of(call: AskedCall) -> int | None:
    match = _SHELL.search(call.result)
    return int(match[1]) if match is not None else None


def _wrong_ids(conversation: Conversation, views: list[policy_pb2.ToolCallView], *, told: bool) -> Iterator[str]:
    """Ids that are another call's, and with `told` those that are missing."""
    shells = _shells(conversation)
    had = {view.pid: view.agent_call_id for view in views if view.agent_call_id or told}
    for pid, call in shells.items():
        if pid in had and had[pid] != call.call_id:
            yield f"call {call.number} of {conversation.number}: id {had[pid]!r}, not {call.call_id!r}"
    if missing := [call.number for call in conversation.calls if call.answered_ns and call not in shells.values()]:
        yield f"calls {missing} of {conversation.number}: their results tell no process"


def asked_in(conversations: Iterable[Conversation], *, ids: bool = False, sessions: bool = False) -> list[Asked]:
    """`ids`, `sessions`: the daemon must know the calls' ids, their conversations' sessions."""
    calls = [(conversation, call) for conversation in conversations for call in conversation.calls]
    return [
        Asked(
            number=number,
            text=call.command.text,
            asked_ns=call.asked_ns,
            answered_ns=call.answered_ns,
            exit_code=call.command.exit_code,
            peak_bytes=call.command.peak_bytes,
            leaves_behind=call.command.leaves_behind,
            call_id=call.call_id,
            id_known=ids,
            session=session_of(conversation) if sessions else "",
            pid=_shell_of(call),
        )
        for number, (conversation, call) in enumerate(calls)
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
        call_id=view.agent_call_id,
        session=view.session_id,
    )
