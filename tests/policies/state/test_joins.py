"""Which sandbox a session is of, and which session a tool call is of, where nobody has said so."""

from __future__ import annotations

from equipoise.policies.events import (
    EngineAttached,
    EngineDetached,
    SandboxRegistered,
    SandboxRemoved,
    SessionJoined,
    ToolCallStarted,
)
from equipoise.policies.model import CgroupId, EngineId, FinishReason, SessionId, ToolCallId
from equipoise.policies.state import State
from equipoise.tests.policies.facts import ENGINE, engine, ns, observed, sandbox, session, started, turn_ended

ONE, TWO = SessionId("anonymous-1"), SessionId("anonymous-2")
CGROUP = CgroupId(1)


def joined(at_s: float, session_id: SessionId, cgroup: int = 1) -> SessionJoined:
    return SessionJoined(ns(at_s), ENGINE, session_id, CgroupId(cgroup))


def fresh() -> State:
    """gold/ada, in cgroup 1, and an engine."""
    return State().apply(SandboxRegistered(0, sandbox())).apply(EngineAttached(0, engine()))


def session_of_a_call(state: State, call: ToolCallStarted | None = None) -> str:
    event = call or started(9.0, id=99)
    session_id = state.apply(event).tool_calls[event.id].session
    state.check_integrity()
    return session_id


def test_a_joined_session_says_its_sandbox_whether_it_was_seen_before_or_after() -> None:
    before = fresh().apply(observed(1.0, session(ONE))).apply(joined(2.0, ONE))
    after = fresh().apply(joined(1.0, ONE)).apply(observed(2.0, session(ONE)))
    assert before.sessions[ONE].sandbox == after.sessions[ONE].sandbox == CGROUP
    assert after.apply(observed(3.0, session(ONE))).sessions[ONE].sandbox == CGROUP, "it is remembered"


def test_a_session_of_another_tenant_is_not_joined() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(observed(2.0, session(ONE, tenant="silver")))
    assert state.sessions[ONE].sandbox is None
    assert session_of_a_call(state) == "gold/ada"


def test_a_join_to_an_unknown_sandbox_is_late() -> None:
    state = fresh().apply(joined(1.0, ONE, cgroup=7)).apply(observed(2.0, session(ONE)))
    assert (state.sessions[ONE].sandbox, state.late_count) == (None, 1)


def test_a_tool_call_is_of_the_only_session_of_its_sandbox() -> None:
    state = fresh().apply(observed(1.0, session(ONE), session(TWO))).apply(joined(2.0, ONE))
    assert session_of_a_call(state) == ONE


def test_a_tool_call_is_of_the_session_that_last_asked_for_a_tool() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(joined(1.0, TWO))
    assert session_of_a_call(state, started(1.5, id=1)) == "gold/ada", "two, and neither has asked"
    state.apply(turn_ended(2.0, session=ONE)).apply(turn_ended(3.0, FinishReason.STOP, session=TWO))
    assert session_of_a_call(state, started(3.5, id=2)) == ONE
    state.apply(turn_ended(4.0, session=TWO))
    assert session_of_a_call(state, started(4.5, id=3)) == TWO


def test_a_session_that_the_agent_names_as_it_was_told_goes_before_all_others() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(turn_ended(1.5, session=ONE))
    state.apply(observed(2.0, session(ONE), session("gold/ada")))
    assert session_of_a_call(state) == "gold/ada"


def test_what_a_hook_says_goes_before_what_connections_show() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(observed(2.0, session(ONE)))
    assert session_of_a_call(state, started(9.0, session=TWO)) == TWO


def test_a_session_that_is_gone_from_its_engine_is_no_longer_joined() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(joined(1.0, TWO)).apply(turn_ended(1.5, session=TWO))
    state.apply(observed(2.0, session(ONE)))
    assert session_of_a_call(state) == ONE
    state.apply(EngineAttached(3, engine("e2"))).apply(EngineDetached(ns(4), EngineId("e2")))
    assert session_of_a_call(state, started(5.0, id=2)) == ONE, "another engine's end is not its"
    assert session_of_a_call(state.apply(EngineDetached(ns(6), ENGINE)), started(7.0, id=3)) == "gold/ada"


def test_a_sandbox_that_is_removed_takes_its_joins_along() -> None:
    state = fresh().apply(joined(1.0, ONE)).apply(observed(2.0, session(ONE))).apply(turn_ended(2.5, session=ONE))
    state.apply(SandboxRemoved(ns(3), CGROUP))
    assert state.sessions[ONE].sandbox is None
    state.check_integrity()
    state.apply(SandboxRegistered(ns(4), sandbox()))
    assert session_of_a_call(state) == "gold/ada"


def test_a_session_that_comes_from_another_sandbox_is_of_that_one() -> None:
    state = fresh().apply(SandboxRegistered(0, sandbox(2, name="bo")))
    state.apply(observed(1.0, session(ONE))).apply(joined(2.0, ONE)).apply(joined(3.0, ONE, cgroup=2))
    assert state.sessions[ONE].sandbox == CgroupId(2)
    assert session_of_a_call(state) == "gold/ada"
    assert ToolCallId(99) in state.tool_calls
