"""PolicyService without a socket: what it answers from memory, and what of the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest
from equipoise.daemon.api.v1 import policy_pb2 as pb
from equipoise.daemon.loop import Loop
from equipoise.daemon.observe.history import History
from equipoise.daemon.observe.journal import Journal
from equipoise.daemon.policy import PolicyKeeper, Sources
from equipoise.daemon.rpc.policy_server import Effects, PolicyServer
from equipoise.policies.actions import Grant, Throttle
from equipoise.policies.events import EngineAttached, SandboxRegistered
from equipoise.policies.model import MIB, NS_PER_S, SessionPhase, ToolCallId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import (
    ADA,
    call,
    decided,
    decision,
    engine,
    host_sampled,
    ns,
    observed,
    policy,
    sandbox,
    session,
    started,
    stepped,
)

T = TypeVar("T")
GRANT = Grant(ToolCallId(1), 1, 640 * MIB)


class Refused(Exception):
    """What abort() of a context says."""


class Context:
    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Refused(code.name, details)


class Asked:
    """A server over a loop of its own; `journal` is empty until something is written."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal.open(folder / "journal.sqlite", boot_id="boot", started_ns=ns(0))
        self.history = History()
        self.loop = Loop(State(policy()), lambda _: None, (self.history,), lambda: ns(5.0))
        for event in (SandboxRegistered(0, sandbox()), host_sampled(), EngineAttached(0, engine())):
            self.loop.emit(event)
        self.loop.emit(observed(0, session(ADA, held_tokens=10, phase=SessionPhase.IDLE)))
        self.loop.emit(started(4.9))
        self.loop.emit(stepped(4.95, 100))
        self.loop.turn()
        keeper = PolicyKeeper(Sources(), lambda: ns(5.0))
        effects = Effects(pb.GetStatusResponse, list, keeper, folder / "journal.sqlite", lambda: None)
        self.server = PolicyServer(self.loop, self.history, effects, lambda: ns(5.0), lambda: 1000 * NS_PER_S)

    def answer(self, asked: Awaitable[T]) -> T:
        async def wait() -> T:
            return await asked

        return asyncio.run(wait())

    def explain(self, **request: Any) -> list[pb.DecisionView]:
        answered = self.answer(self.server.Explain(pb.ExplainRequest(**request), cast(Any, Context())))
        return list(answered.decisions)

    def why_not(self, id: str) -> pb.WhyNotResponse:
        return self.answer(self.server.WhyNot(pb.WhyNotRequest(id=id), cast(Any, Context())))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_a_session_is_asked_about_by_its_id_and_a_running_call_answers_for_its_session_too(asked: Asked) -> None:
    answered = asked.why_not(str(ADA))
    assert answered.subject == "session gold/ada, idle, KV device"
    kv = next(look for look in answered.looks if look.rule.startswith("keep, swap"))
    assert kv.why == "pytest has run for less than kv.decideAfter"
    assert (round(kv.measurement, 3), kv.threshold, kv.unit) == (0.1, 0.25, "s")
    about_call = asked.why_not("1")
    assert about_call.subject == "gold/ada pytest, running, peak 100 MiB, no budget"
    assert {look.rule for look in answered.looks} < {look.rule for look in about_call.looks}


def test_whoever_nobody_knows_is_not_found(asked: Asked) -> None:
    for wrong in ("gold/nobody", "ffff", "%"):
        with pytest.raises(Refused, match="NOT_FOUND"):
            asked.why_not(wrong)
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        asked.why_not("")


def test_a_call_that_only_the_journal_knows_is_answered_from_it(asked: Asked) -> None:
    old = call(7, used_mib=300, start_s=1.0, phase_since_ns=0)
    asked.journal.record_tool_call(old)
    throttle = Throttle(ToolCallId(8), 1, 0.2, ns(9.0))
    made = decision(throttle, 2.0, "d8")
    asked.journal.record_decision(made)
    asked.journal.record_decision(decision(GRANT, 2.0, "d9"))
    asked.journal.flush()
    answered = asked.why_not("7")
    assert answered.subject.endswith("of 512 MiB, of an earlier run")
    assert [look.rule for look in answered.looks] == ["tool call at its budget"], "it was weighed against nobody"


def test_memory_answers_first_and_the_journal_fills_up_without_saying_anything_twice(asked: Asked) -> None:
    for event in (decided(GRANT, 5.0, "d3"), decided(GRANT, 4.0, "d2")):
        asked.journal.record(event)
    asked.journal.record(decided(GRANT, 1.0, "d1"))
    asked.journal.flush()
    for event in (decided(GRANT, 4.0, "d2"), decided(GRANT, 5.0, "d3")):
        asked.loop.emit(event)
    asked.loop.turn()
    grants = [view.decision_id for view in asked.explain() if view.action == "grant 640 MiB"]
    assert grants == ["d3", "d2", "d1"]
    assert [view.decision_id for view in asked.explain(limit=1)] == ["d3"]
    (one,) = asked.explain(decision_id="d1")
    assert one.at_unix_ns > 0
    assert asked.explain()[0].at_unix_ns == 1000 * NS_PER_S, "by the wall clock of now"


def test_texts_to_check_are_needed_to_check(asked: Asked) -> None:
    with pytest.raises(Refused, match="only_check without texts"):
        asked.answer(asked.server.ApplyPolicy(pb.ApplyPolicyRequest(only_check=True), cast(Any, Context())))
