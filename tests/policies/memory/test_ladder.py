"""What is done to tool calls: grants, waits, kills, throttles and their ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.actions import Freeze, Grant, Kill, Thaw, Throttle, Wait
from equipoise.policies.memory.ladder import climb
from equipoise.policies.memory.step import Step, subject
from equipoise.policies.model import MIB, NS_PER_S, Host, KvTier, ToolCall, ToolCallId, ToolCallPhase
from equipoise.policies.policy import Budget, CallClass, LadderRule, Measure, Policy, Rung
from equipoise.tests.policies.facts import call, engine, host, learned, ns, policy, sandbox, session, snapshot, stopped
from equipoise.tests.policies.laws import decide_lawfully


def steps(now_s: float, *calls: ToolCall, of: Policy | None = None, **more: object) -> list[Step]:
    of = of or policy()
    return climb(snapshot(now_s, of, tool_calls=calls, **more), of)


def done(now_s: float, *calls: ToolCall, of: Policy | None = None, **more: object) -> dict[int, str]:
    """What is done to which call: {1: "Grant"}."""
    made = steps(now_s, *calls, of=of, **more)
    assert len({step.call.id for step in made}) == len(made), "one answer a call"
    return {int(step.call.id): type(step.action).__name__ for step in made}


# -- a call that stands at its budget


def test_a_stopped_call_is_granted_a_step_while_the_pool_has_room() -> None:
    (step,) = steps(1.0, stopped(used_mib=512), of=policy(pool_mib=1024, step_bytes=256 * MIB))
    assert step.action == Grant(step.call.id, 576 * MIB, 768 * MIB)
    assert step.trigger_ns == 0
    assert (step.measurement, step.threshold, step.unit) == (768, 1024, "MiB")


def test_a_grant_covers_what_the_call_overshot() -> None:
    (step,) = steps(1.0, stopped(used_mib=520, hard_mib=512))
    assert isinstance(step.action, Grant) and step.action.hard_bytes == 776 * MIB


def test_a_grant_never_passes_the_largest_budget() -> None:
    (step,) = steps(1.0, stopped(used_mib=900), of=policy(pool_mib=4096, max_bytes=1024 * MIB))
    assert isinstance(step.action, Grant) and step.action.hard_bytes == 1024 * MIB


@pytest.mark.parametrize("standing", [stopped(used_mib=1024), stopped(used_mib=900, hard_mib=1024)])
def test_at_the_largest_budget_a_call_ends_and_is_told_why(standing: ToolCall) -> None:
    (step,) = steps(1.0, standing, of=policy(pool_mib=4096, bends=False))
    assert isinstance(step.action, Kill)
    assert "largest budget" in step.rule
    assert f"{standing.peak_bytes // MIB} MiB" in step.action.message and "1024 MiB" in step.action.message
    assert "\n" not in step.action.message


def test_a_call_already_past_the_largest_budget_is_not_granted_less_than_it_has() -> None:
    assert done(1.0, stopped(used_mib=1500, hard_mib=512), of=policy(pool_mib=4096, bends=False)) == {1: "Kill"}


def test_the_largest_budget_bends_while_another_call_could_still_have_as_much() -> None:
    roomy = policy(pool_mib=2304)  # 1024 held, a step of 256, and 1024 for another
    (step,) = steps(1.0, stopped(used_mib=1024), of=roomy)
    assert isinstance(step.action, Grant) and step.action.hard_bytes == 1280 * MIB
    assert step.rule == "tool call at the largest budget, nobody else needs the memory"
    assert done(1.0, stopped(used_mib=1280), of=roomy) == {1: "Kill"}, "the next step would take the other's"
    assert done(1.0, stopped(used_mib=1024), call(2, used_mib=1), of=roomy) == {1: "Kill"}


def test_it_bends_for_nobody_while_others_that_stand_could_not_have_their_step() -> None:
    roomy = policy(pool_mib=4096)
    large, asking = stopped(1, used_mib=1536), stopped(2, "silver", used_mib=512)
    assert done(1.0, large, asking, of=roomy) == {1: "Grant", 2: "Grant"}, "1536 are left"
    assert done(1.0, large, asking, call(3, used_mib=600), of=roomy) == {1: "Kill", 2: "Grant"}


def test_what_bent_is_spoken_for() -> None:
    two = stopped(1, used_mib=1024), stopped(2, "silver", used_mib=1024)
    assert done(1.0, *two, of=policy(pool_mib=3584)) == {1: "Grant", 2: "Grant"}
    assert sorted(done(1.0, *two, of=policy(pool_mib=3583)).values()) == ["Grant", "Kill"]


def test_a_soft_budget_stays_in_proportion() -> None:
    (step,) = steps(1.0, stopped(used_mib=512))
    assert isinstance(step.action, Grant)
    assert step.action.soft_bytes == step.action.hard_bytes * 384 // 512


def test_without_room_a_stopped_call_waits_while_another_can_still_free_some() -> None:
    (step,) = steps(1.0, stopped(1, used_mib=512, since_s=0.5), call(2, used_mib=400))
    assert step.action == Wait(step.call.id, 256 * MIB, ns(20.5))


def test_a_call_that_was_told_to_wait_is_not_told_again() -> None:
    waiting = replace(stopped(1, used_mib=512), waiting_until_ns=ns(20))
    assert done(1.0, waiting, call(2, used_mib=400)) == {}


def test_a_waiting_call_is_granted_as_soon_as_there_is_room() -> None:
    waiting = replace(stopped(1, used_mib=512), waiting_until_ns=ns(20))
    assert done(1.0, waiting, call(2, used_mib=100)) == {1: "Grant"}


def test_a_wait_that_is_over_ends_the_call() -> None:
    waiting = replace(stopped(1, used_mib=512), waiting_until_ns=ns(20))
    (step,) = steps(20.0, waiting, call(2, used_mib=400))
    assert isinstance(step.action, Kill)
    assert "waited 20.0 s" in step.action.message and "512 MiB" in step.action.message


def test_the_host_must_have_what_the_pool_would_give() -> None:
    roomy = policy(pool_mib=4096)
    assert done(1.0, stopped(used_mib=512), call(2), of=roomy, host=host(available_mib=256)) == {1: "Grant"}
    assert done(1.0, stopped(used_mib=512), call(2), of=roomy, host=host(available_mib=255)) == {1: "Wait"}


def test_a_fresh_grant_counts_as_used() -> None:
    lately = call(2, used_mib=300, hard_mib=600, granted_ns=ns(0.5))
    assert done(1.0, stopped(used_mib=400), lately) == {1: "Wait"}
    assert done(1.0, stopped(used_mib=300), lately) == {1: "Wait"}, "300 + 600 are spoken for, 124 of 256 are free"
    known = learned(400)
    assert done(1.0, stopped(used_mib=400), lately, estimates=known) == {1: "Wait"}
    assert done(1.5, stopped(used_mib=400), lately, estimates=known) == {1: "Grant"}, "it has had its second"


def test_a_fresh_grant_is_not_held_for_a_call_that_is_over_or_stands_again() -> None:
    lately = call(2, used_mib=300, hard_mib=600, granted_ns=ns(0.5))
    gone = replace(lately, phase=ToolCallPhase.ENDED, end_ns=ns(0.6), gone_ns=ns(0.6), used_bytes=0)
    assert done(1.0, stopped(used_mib=400), gone) == {1: "Grant"}
    again = replace(lately, phase=ToolCallPhase.STOPPED, stopped_ns=ns(0.9), used_bytes=600 * MIB)
    assert done(1.0, stopped(used_mib=100), again, of=policy(pool_mib=956)) == {2: "Grant", 1: "Wait"}, (
        "who was granted something is served on"
    )


def test_nobody_is_judged_before_the_host_is_known() -> None:
    unknown = replace(policy(), memory=replace(policy().memory, tool_pool_bytes=None))
    assert done(99.0, stopped(used_mib=512), of=unknown, host=Host()) == {}


def test_a_stopped_call_whose_processes_are_gone_needs_no_answer() -> None:
    assert done(1.0, replace(stopped(used_mib=512), gone_ns=ns(0.5))) == {}


def test_an_escapee_that_stands_is_answered_like_a_call() -> None:
    escapee = replace(stopped(used_mib=512), phase=ToolCallPhase.ENDED, end_ns=ns(0.5))
    assert done(1.0, escapee) == {1: "Grant"}
    assert done(1.0, escapee, call(2, used_mib=400)) == {1: "Wait"}
    assert done(99.0, escapee, call(2, used_mib=400)) == {1: "Kill"}


# -- who is served first and who pays


def test_room_for_one_goes_to_the_tenant_with_the_least_share() -> None:
    poor, rich = stopped(1, "gold", used_mib=200), stopped(2, "silver", used_mib=500)
    assert done(1.0, rich, poor, call(3)) == {1: "Grant", 2: "Wait"}


def test_among_equals_the_one_that_stands_longest_is_served_first() -> None:
    late, early = stopped(1, used_mib=380, since_s=0.5), stopped(2, used_mib=380, since_s=0.2)
    assert done(1.0, late, early, call(3)) == {2: "Grant", 1: "Wait"}


def test_several_grants_of_one_moment_do_not_overdraw_the_pool() -> None:
    calls = [stopped(i, used_mib=100, since_s=i / 100, expected_bytes=300 * MIB) for i in range(1, 8)]
    made = done(1.0, *calls, call(8), of=policy(pool_mib=700 + 2 * 256))
    assert made == {1: "Grant", 2: "Grant", 3: "Wait", 4: "Wait", 5: "Wait", 6: "Wait", 7: "Wait"}


def test_where_every_call_stands_the_one_furthest_above_its_share_pays() -> None:
    (kill, grant) = steps(1.0, stopped(1, "gold", used_mib=400), stopped(2, "silver", used_mib=600))
    assert (kill.call.id, type(kill.action)) == (2, Kill)
    assert kill.rule == "every tool call waits for memory"
    assert (grant.call.id, type(grant.action)) == (1, Grant), "its memory is free for the other"
    assert [c.name for c in kill.candidates] == ["kill pytest of silver", "kill pytest of gold"]


def test_a_weight_decides_who_pays() -> None:
    of = policy(tenants={"gold": 4.0, "silver": 1.0})
    assert done(1.0, stopped(1, "gold", used_mib=600), stopped(2, "silver", used_mib=400), of=of)[2] == "Kill"


def test_within_a_tenant_its_largest_call_pays() -> None:
    assert done(1.0, stopped(1, used_mib=300), stopped(2, used_mib=700)) == {2: "Kill", 1: "Grant"}


def test_nobody_pays_while_a_killed_call_is_still_dying() -> None:
    dying = call(3, used_mib=100, phase=ToolCallPhase.KILLED)
    assert done(1.0, stopped(1, used_mib=500), stopped(2, "silver", used_mib=424), dying) == {1: "Wait", 2: "Grant"}


def test_nobody_pays_where_one_of_those_standing_can_go_on() -> None:
    small, large = stopped(1, "gold", used_mib=100), stopped(2, "silver", used_mib=600)
    assert done(1.0, small, large) == {1: "Grant", 2: "Wait"}


def test_when_two_waits_end_together_only_the_richer_tenant_pays() -> None:
    poor = replace(stopped(1, "gold", used_mib=300), waiting_until_ns=ns(20))
    rich = replace(stopped(2, "silver", used_mib=500), waiting_until_ns=ns(20))
    assert done(20.0, poor, rich, call(3, used_mib=200)) == {2: "Kill", 1: "Grant"}


def test_when_a_wait_ends_a_richer_tenant_that_holds_a_grant_pays_instead_of_the_one_that_waited() -> None:
    of = policy(tenants={"gold": 4.0, "silver": 1.0}, pool_mib=1000)
    waited = replace(stopped(1, "gold", used_mib=300), waiting_until_ns=ns(20))
    granted = call(2, "silver", used_mib=600, hard_mib=768)
    assert done(19.9, waited, granted, of=of) == {}
    steps_now = steps(20.0, waited, granted, of=of)
    assert {int(s.call.id): type(s.action).__name__ for s in steps_now} == {2: "Kill", 1: "Grant"}
    assert "waited 20.0 s" in steps_now[0].evidence


def test_when_a_wait_ends_nobody_else_pays_who_holds_no_more_than_it_began_with() -> None:
    waited = replace(stopped(1, "gold", used_mib=500), waiting_until_ns=ns(20))
    assert done(20.0, waited, call(2, "silver", used_mib=512)) == {1: "Kill"}


def test_within_a_tenant_the_call_that_stands_pays_before_one_that_gets_on() -> None:
    waited = replace(stopped(1, "gold", used_mib=300), waiting_until_ns=ns(20))
    assert done(20.0, waited, call(2, "gold", used_mib=700, hard_mib=768)) == {1: "Kill"}


def test_memory_of_a_call_that_is_dying_is_not_asked_of_another() -> None:
    dying = call(3, "silver", used_mib=600, phase=ToolCallPhase.KILLED, phase_since_ns=ns(19.9))
    waited = replace(stopped(1, "gold", used_mib=300), waiting_until_ns=ns(20))
    assert done(20.0, waited, dying, call(2, "silver", used_mib=100)) == {1: "Grant"}


def test_what_was_killed_long_ago_and_has_not_died_is_not_free_and_is_not_waited_for() -> None:
    hangs = call(3, "silver", used_mib=600, phase=ToolCallPhase.KILLED, phase_since_ns=ns(2.0))
    one, two = stopped(1, "gold", used_mib=300), stopped(2, "silver", used_mib=100)
    assert done(11.9, one, two, hangs) == {1: "Grant", 2: "Grant"}
    assert done(12.0, one, two, hangs) == {1: "Grant", 2: "Kill"}


def test_where_all_would_stand_the_first_is_granted_what_room_there_is_instead_of_a_kill() -> None:
    calls = stopped(1, "gold", used_mib=500), stopped(2, "silver", used_mib=424)
    made = steps(1.0, *calls)
    assert {int(s.call.id): type(s.action).__name__ for s in made} == {2: "Grant", 1: "Wait"}
    assert made[0].action == Grant(calls[1].id, 393 * MIB, 524 * MIB)
    assert done(1.0, calls[0], stopped(2, "silver", used_mib=500)) == {1: "Kill", 2: "Grant"}, "24 MiB help nobody"


def test_memory_of_a_call_that_is_dying_serves_one_that_stands_a_moment_later_as_it_does_at_once() -> None:
    of = policy(pool_mib=1024, budget=Budget(MIB, MIB), max_bytes=513 * MIB, step_bytes=MIB, wait_ns=0)
    largest, standing = stopped(1, "gold", used_mib=513), stopped(2, "silver", used_mib=0, hard_mib=512)
    at_once = decide_lawfully(snapshot(0.0, of, tool_calls=(largest, standing)), of)
    assert [type(d.action) for d in at_once] == [Kill, Grant]
    dying = replace(largest, phase=ToolCallPhase.KILLED, stopped_ns=None)
    (later,) = decide_lawfully(snapshot(0.0, of, tool_calls=(dying, standing)), of)
    assert later.action == at_once[1].action == Grant(standing.id, 513 * MIB, 513 * MIB)


def test_memory_of_a_call_that_is_dying_is_not_granted_twice() -> None:
    of = policy(pool_mib=1024, budget=Budget(MIB, MIB), max_bytes=513 * MIB, step_bytes=MIB)
    dying = call(1, used_mib=513, phase=ToolCallPhase.KILLED)
    served = call(2, "silver", hard_mib=513, granted_ns=ns(0.5))
    standing = stopped(3, "silver", used_mib=0, hard_mib=512)
    (answer,) = decide_lawfully(snapshot(1.0, of, tool_calls=(dying, served, standing)), of)
    assert isinstance(answer.action, Wait), "513 of 1024 MiB are promised to the second call: 511 are left"


def test_memory_of_a_call_that_ends_at_the_largest_budget_serves_the_others() -> None:
    runaway, modest = stopped(1, "silver", used_mib=1024), stopped(2, "gold", used_mib=500)
    assert done(1.0, runaway, modest, of=policy(pool_mib=1524)) == {1: "Kill", 2: "Grant"}


def test_an_answer_names_all_that_stand_in_the_order_in_which_they_are_served() -> None:
    calls = (stopped(1, "gold", used_mib=300), stopped(2, "silver", used_mib=400), call(3, "silver", used_mib=200))
    made = {int(step.call.id): [(c.name, c.cost) for c in step.candidates] for step in steps(0.0, *calls)}
    assert made == {
        1: [("serve pytest of gold", 1), ("serve pytest of silver", 2)],
        2: [("serve pytest of silver", 2), ("serve pytest of gold", 1)],
    }


# -- lasting pressure


def pressed(now_s: float, *calls: ToolCall, since_s: float = 0.0, of: Policy | None = None) -> dict[int, str]:
    return done(now_s, *calls, of=of, pressure_since_ns=ns(since_s))


def test_lasting_pressure_slows_down_the_largest_call_of_the_richest_tenant() -> None:
    calls = (call(1, "gold", used_mib=300), call(2, "silver", used_mib=200), call(3, "silver", used_mib=450))
    (step,) = steps(2.0, *calls, pressure_since_ns=0)
    assert step.action == Throttle(step.call.id, 450 * MIB, 0.2, ns(7))
    assert step.call.id == 3
    assert step.rule == "tool pool above 0.90 for 2s"
    assert [c.name for c in step.candidates][:2] == ["throttle pytest of silver", "throttle pytest of silver"]


def test_short_pressure_is_only_observed() -> None:
    assert pressed(1.99, call(used_mib=950)) == {}
    assert pressed(2.0, call(used_mib=950)) == {1: "Throttle"}


def test_calls_are_slowed_down_one_at_a_time() -> None:
    slowed = call(1, used_mib=500, phase=ToolCallPhase.THROTTLED, phase_since_ns=ns(2))
    assert pressed(3.0, slowed, call(2, used_mib=450)) == {}
    assert pressed(4.0, slowed, call(2, used_mib=450)) == {2: "Throttle"}


def test_a_call_that_holds_next_to_nothing_is_left_alone() -> None:
    assert pressed(9.0, call(used_mib=9)) == {}
    escapee = call(2, used_mib=950, end_ns=1, phase=ToolCallPhase.ENDED)
    assert pressed(9.0, call(used_mib=9), escapee) == {}


def test_throttled_calls_are_let_go_when_the_pressure_has_passed() -> None:
    slowed = [call(i, used_mib=100, phase=ToolCallPhase.THROTTLED) for i in (1, 2)]
    made = steps(3.0, *slowed, pressure_since_ns=None)
    assert [step.action for step in made] == [Thaw(c.id) for c in slowed]


def test_throttled_calls_stay_slow_between_the_marks() -> None:
    assert pressed(1.0, call(1, used_mib=850, phase=ToolCallPhase.THROTTLED)) == {}


def test_a_rule_may_freeze_and_holds_back_another_call_than_the_rules_before_it() -> None:
    rules = (LadderRule(), LadderRule(Measure.HOST_MEMORY, rung=Rung.FREEZE, lasting_ns=3 * NS_PER_S))
    of = policy(ladder=rules)
    made = steps(4.0, call(1, used_mib=500), call(2, used_mib=450), of=of, pressure_since_ns=0)
    assert [step.action for step in made] == [
        Throttle(ToolCallId(1), 500 * MIB, 0.2, ns(9)),
        Freeze(ToolCallId(2), ns(7)),
    ]
    assert [step.rule for step in made] == ["tool pool above 0.90 for 2s", "host memory above 0.90 for 2s"]


def test_a_call_is_frozen_again_only_after_it_has_run_as_long_as_it_stood() -> None:
    of = policy(ladder=(LadderRule(for_ns=0, rung=Rung.FREEZE, lasting_ns=3 * NS_PER_S),))
    went_on = call(1, used_mib=950, phase_since_ns=ns(10))
    assert pressed(12.9, went_on, of=of) == {}
    assert pressed(13.0, went_on, of=of) == {1: "Freeze"}
    assert pressed(12.9, went_on, call(2, used_mib=50), of=of) == {2: "Freeze"}, "meanwhile it is another's turn"


def test_what_is_frozen_goes_on_when_no_rule_that_freezes_presses() -> None:
    frozen, slowed = call(1, used_mib=100, phase=ToolCallPhase.FROZEN), call(2, phase=ToolCallPhase.THROTTLED)
    of = policy(ladder=(LadderRule(),))
    assert [s.action for s in steps(1.0, frozen, slowed, of=of, pressure_since_ns=0)] == [Thaw(frozen.id)]


def test_a_ladder_without_rules_holds_nobody_back() -> None:
    assert done(9.0, call(used_mib=1000), of=policy(ladder=()), pressure_since_ns=0) == {}


def test_a_class_waits_for_memory_as_long_as_it_says() -> None:
    impatient = CallClass("tests", tool="pytest", wait_ns=NS_PER_S)
    of = replace(policy(pool_mib=1000), classes=(impatient,))
    holder, waits = call(1, "gold", used_mib=900, command="make"), stopped(2, "silver", used_mib=100)
    (asked,) = steps(0.0, holder, waits, of=of)
    assert isinstance(asked.action, Wait) and asked.action.expires_ns == ns(1)
    (ended,) = [s for s in steps(1.0, holder, waits, of=of) if isinstance(s.action, Kill)]
    assert ended.rule == "no memory for a stopped call within its wait"


def test_kv_on_the_device_makes_a_tenant_richer_too() -> None:
    held = session("s", "gold", held_tokens=900, tier=KvTier.DEVICE)
    made = steps(
        2.0,
        call(1, "gold", used_mib=450),
        call(2, "silver", used_mib=500),
        pressure_since_ns=0,
        sessions=(held,),
        engines=(engine(capacity_tokens=1000),),
    )
    assert [step.call.id for step in made] == [1]


def test_without_calls_there_is_nothing_to_do() -> None:
    assert done(5.0, pressure_since_ns=0) == {}


def test_a_call_is_named_by_its_sandbox_or_at_least_its_tenant() -> None:
    assert subject(call(), (sandbox(),)) == "gold/ada pytest"
    assert subject(call(), ()) == "gold pytest"
