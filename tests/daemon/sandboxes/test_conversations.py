"""Which conversation a call is of, from what agents put into the environment of some of their calls."""

from __future__ import annotations

from equipoise.daemon.sandboxes.conversations import Conversations
from equipoise.policies.events import EngineAttached, SandboxRegistered, SessionJoined
from equipoise.policies.model import SessionId, ToolCallId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import ENGINE, engine, observed, policy, sandbox, session

ONE, OTHER = 41, 42
"""Processes of runtimes."""


class Bench:
    def __init__(self) -> None:
        self.state = State(policy()).apply(SandboxRegistered(0, sandbox()))
        self.box = sandbox()
        self.conversations = Conversations()

    def heard(self, call: int, runtime: int, name: str | None) -> dict[int, str | None]:
        found = self.conversations.heard(5, ToolCallId(call), runtime, name, self.box, self.state)
        return {event.id: event.session for event in found}

    def of(self, name: str) -> str:
        return f"{self.box.tenant}/{name}"


def test_a_call_that_names_its_conversation_is_of_it() -> None:
    bench = Bench()
    assert bench.heard(11, ONE, "left") == {11: bench.of("left")}
    assert bench.heard(12, OTHER, "right") == {12: bench.of("right")}


def test_a_call_that_does_not_is_of_the_only_one_of_its_runtime_whichever_came_first() -> None:
    bench = Bench()
    assert bench.heard(11, ONE, None) == {}
    assert bench.heard(12, ONE, "left") == {11: bench.of("left"), 12: bench.of("left")}
    assert bench.heard(13, ONE, None) == {13: bench.of("left")}
    assert bench.heard(14, OTHER, None) == {}, "another runtime's"


def test_of_a_runtime_with_several_nobody_can_say() -> None:
    bench = Bench()
    for call, name in ((11, "left"), (12, "right")):
        bench.heard(call, ONE, name)
    assert bench.heard(13, ONE, None) == {}
    assert bench.heard(14, ONE, "right") == {14: bench.of("right")}


def test_a_call_that_says_so_only_after_its_second_exec_is_told_once() -> None:
    bench = Bench()
    assert bench.heard(11, ONE, None) == {}
    assert bench.heard(11, ONE, "left") == {11: bench.of("left")}
    assert bench.heard(12, ONE, "left") == {12: bench.of("left")}


def test_of_runtimes_that_name_none_the_first_has_the_sandboxes_own_session_and_each_other_one_of_its_process() -> None:
    bench = Bench()
    told = [bench.conversations.of_process(pid, bench.box, bench.state) for pid in (41, 42, 41, 43, 42)]
    ours = [bench.of(f"{bench.box.name}:{pid}") for pid in (42, 43)]
    assert told == [None, ours[0], None, ours[1], ours[0]]


def test_where_an_engine_has_sessions_of_the_sandbox_no_process_stands_for_one() -> None:
    bench = Bench()
    bench.conversations.of_process(41, bench.box, bench.state)
    bench.state.apply(EngineAttached(1, engine())).apply(observed(1, session("gold/talk")))
    bench.state.apply(SessionJoined(1, ENGINE, SessionId("gold/talk"), bench.box.cgroup_id))
    assert bench.conversations.of_process(42, bench.box, bench.state) is None
