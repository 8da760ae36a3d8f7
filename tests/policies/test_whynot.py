"""Why nothing was done: each rule that looks says what stopped it, its measurement against its threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from equipoise.policies.actions import Candidate, Release, Retain
from equipoise.policies.decide import decide
from equipoise.policies.model import KvTier, Session, SessionPhase, ToolCall, ToolCallPhase, Verdict
from equipoise.policies.policy import LadderRule, Measure, Mode, Policy, Rung
from equipoise.policies.whynot import Look, last_weighed, passed_over, why_not_call, why_not_session
from equipoise.tests.policies.facts import ADA, ENGINE, call, decision, engine, ns, policy, session, snapshot

RULE = "tool pool above 0.90 for 2s: throttle"


def looks(
    of: ToolCall, *others: ToolCall, now_s: float = 5.0, by: Policy | None = None, **more: object
) -> dict[str, Look]:
    by = by or policy()
    seen = snapshot(now_s, by, tool_calls=(of, *others), **more)
    return {look.rule: look for look in why_not_call(seen, by, of)}


def why_kv(of: Session, *calls: ToolCall, by: Policy | None = None, **more: Any) -> str:
    by = by or policy()
    seen = snapshot(5.0, by, sessions=(of,), engines=(engine(**more),), tool_calls=calls)
    answered = {look.rule: look.why for look in why_not_session(seen, by, seen.sessions[0])}
    return answered.get("keep, swap or drop while a tool runs", "") or answered["its engine"]


def test_a_small_call_in_an_empty_pool_never_had_to_ask_and_nothing_presses() -> None:
    found = looks(call(used_mib=100))
    assert found["tool call at its budget"] == Look(
        "tool call at its budget", "its peak is below: it never had to ask", 100, 512, "MiB"
    )
    assert found[RULE] == Look(RULE, "it does not press", 100 / 1024, 0.9, "of the pool")


def test_each_thing_that_spares_a_call_is_named() -> None:
    full = call(2, "silver", used_mib=900)
    cases = {
        "it could be the agent: nothing holds it back": call(1, used_mib=90, exempt=True),
        "it is throttled already": call(1, used_mib=90, phase=ToolCallPhase.THROTTLED),
        "it holds 9 MiB, less than 1% of the pool": call(1, used_mib=9),
        "1 call goes before it: pytest of silver is further above its share": call(1, used_mib=90),
        "it is next": call(1, used_mib=950),
    }
    for why, of in cases.items():
        assert looks(of, full, pressure_since_ns=0)[RULE].why == why
    assert (
        looks(call(1, used_mib=950), pressure_since_ns=ns(4))[RULE].why == "it has pressed for 1.0 s and must for 2 s"
    )
    waits = policy(ladder=(LadderRule(Measure.MEMORY_PRESSURE),))
    (_, look) = looks(call(1), by=waits).values()
    assert look.why == "memory pressure is not measured on this host"


def test_a_call_that_has_just_been_frozen_must_run_first() -> None:
    by = policy(ladder=(LadderRule(rung=Rung.FREEZE),))
    look = looks(call(1, used_mib=950, phase_since_ns=ns(3)), by=by, pressure_since_ns=0)[
        f"{by.memory.ladder[0].words}: freeze"
    ]
    assert look == Look(look.rule, "it must first run for as long as a freeze lasts", 2, 5, "s")


def test_what_is_next_by_its_look_is_what_is_decided() -> None:
    of, other = call(1, "gold", used_mib=300), call(2, "silver", used_mib=650)
    seen = snapshot(5.0, policy(), tool_calls=(of, other), pressure_since_ns=0)
    (made,) = decide(seen, policy())
    assert made.action.tool_call == other.id  # type: ignore[union-attr]  # a throttle
    assert {look.rule: look.why for look in why_not_call(seen, policy(), other)}[RULE] == "it is next"
    assert "goes before it" in looks(of, other, pressure_since_ns=0)[RULE].why


def test_whoever_was_passed_over_is_told_who_was_chosen_and_at_what_cost() -> None:
    of, other = call(1, "gold", used_mib=300), call(2, "silver", used_mib=650)
    made = decide(snapshot(5.0, policy(), tool_calls=(of, other), pressure_since_ns=0), policy())
    (look,) = passed_over(of, made)
    assert (look.rule, look.threshold) == ("tool pool above 0.90 for 2s", 0.9)
    assert look.why.startswith("silver pytest was chosen: throttle pytest of silver -0.6")
    assert ", throttle pytest of gold -0.2" in look.why
    assert passed_over(other, made) == ()
    assert passed_over(call(3, "gold", kind="cc"), made) == ()


def test_a_budget_says_how_near_it_came() -> None:
    assert looks(call(used_mib=100, exempt=True))["tool call at its budget"].why.startswith("it has no budget")
    assert "see what was decided then" in looks(call(used_mib=600))["tool call at its budget"].why
    standing = call(used_mib=512, phase=ToolCallPhase.STOPPED, stopped_ns=1)
    assert looks(standing)["tool call at its budget"].why.startswith("it stands there")
    gone = call(used_mib=10, phase=ToolCallPhase.ENDED, end_ns=2, gone_ns=3)
    assert "all of its processes are gone" in looks(gone)["the ladder"].why


def test_a_mode_that_does_nothing_is_said_first() -> None:
    found = why_not_call(snapshot(1.0), replace(policy(), mode=Mode.OBSERVE), call())
    assert found[0] == Look("the policy's mode", "is observe: nothing is decided")


def test_kv_that_stays_says_what_stopped_the_verdict() -> None:
    idle = session(ADA, held_tokens=100, phase=SessionPhase.IDLE)
    running = call(session=ADA, start_s=1.0)
    assert why_kv(idle, running, attached=False) == "is not attached: nothing can be asked of it"
    assert why_kv(replace(idle, phase=SessionPhase.RUNNING)) == "a turn of it is running: its KV is in use"
    assert why_kv(replace(idle, held_tokens=0), running) == "it holds no KV"
    assert why_kv(idle) == "no tool call of its agent runs"
    assert why_kv(idle, call(session=ADA, start_s=4.9)) == "pytest has run for less than kv.decideAfter"
    young = replace(idle, verdict=Verdict.KEEP, verdict_ns=ns(4.0))
    assert why_kv(young, running) == "the last verdict is younger than kv.dwell"
    old = replace(idle, verdict=Verdict.KEEP, verdict_ns=ns(1.0))
    assert why_kv(old, running) == "keep stands: nothing else is cheaper by kv.hysteresis, 20%"


def test_the_last_costs_are_those_of_the_newest_decision_that_weighed_any() -> None:
    weighed = (Candidate("keep", 0.5), Candidate("swap", 2.0))
    bare, kept = decision(Release(ENGINE, ADA, 1), 4.0), decision(Retain(ENGINE, ADA, 1, 2), 3.0)
    found = last_weighed((bare, replace(kept, candidates=weighed), kept), ns(5.0))
    assert found == (Look("what it was last weighed at", "2.0 s ago a rule: keep 0.5, swap 2", 1.0, 0.5, "MiB"),)
    assert last_weighed((bare,), ns(5.0)) == ()


def test_what_was_moved_out_says_why_it_is_not_back_and_the_door_why_it_holds_nobody() -> None:
    out = session(ADA, held_tokens=900, tier=KvTier.HOST, phase=SessionPhase.IDLE)
    full = engine(capacity_tokens=1000, used_tokens=500)
    seen = snapshot(5.0, sessions=(out,), engines=(full,))
    found = {look.rule: look for look in why_not_session(seen, policy(), out)}
    assert found["bring back what was moved out"] == Look(
        "bring back what was moved out", "the device has no room for it", 900, 500, "tokens"
    )
    assert found["the door"].why == "the policy has none (kv.door)"
    with_door = replace(policy(), kv=replace(policy().kv, door_ratio=0.5))
    (*_, door) = why_not_session(seen, with_door, out)
    assert door.why == "the awake leave room, or its KV is in place"
    assert door.threshold == 0.5 * (1000 + full.host_capacity_bytes / full.bytes_per_token)
