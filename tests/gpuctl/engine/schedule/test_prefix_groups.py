"""Turns that begin alike: one computes what they share, nobody waits for it in vain, and no tenant pays for another."""

from __future__ import annotations

import time

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.engine.compute.runner import ContextMode
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.schedule.ledger import Ledger
from equipoise.gpuctl.engine.schedule.prefix_groups import PrefixGroups
from equipoise.gpuctl.engine.schedule.scheduler import Scheduler, SchedulerConfig
from equipoise.gpuctl.engine.schedule.sequence import (
    Session,
    SessionId,
    Slo,
    TenantId,
    Turn,
    TurnEvent,
    TurnFinished,
    TurnId,
    TurnRequest,
    common_prefix,
)
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven
from equipoise.tests.gpuctl.engine.driving import Turn as DrivenTurn
from equipoise.tests.gpuctl.engine.fakes import FakeRunner

PREFIX = "You are one of several agents. Your tools are: " * 4


def running(driven: Driven) -> set[str]:
    return set(driven.engine._scheduler.running)


def test_agents_that_arrive_together_compute_their_common_prefix_once():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10)
    rests = [f"{n} is your number" for n in range(8)]
    turns = [driven.turn(f"a{n}", PREFIX + rest) for n, rest in enumerate(rests)]
    driven.settle()
    assert driven.engine.totals.prefill_tokens == len(PREFIX) + sum(map(len, rests))
    for rest, turn in zip(rests, turns, strict=True):
        assert turn.text == driven.runner.expected_output(PREFIX + rest, 5)
    cached = [turn.end.cached_tokens for turn in turns if turn.end]
    assert cached == [0] + [len(PREFIX)] * 7


def test_agents_of_several_kinds_share_at_each_depth_what_they_have_in_common():
    driven = Driven(kv_tokens=3000, share_prefix_tokens=10, max_running=12)
    coder, tester = PREFIX + "You write code. " * 6, PREFIX + "You test code. " * 6
    rests = [f"#{n}" for n in range(6)]
    for n, rest in enumerate(rests):
        driven.turn(f"c{n}", coder + rest)
        driven.turn(f"t{n}", tester + rest)
    driven.settle()
    # "You " is common to both kinds, "#" to those of a kind.
    common = len(PREFIX) + len("You ")
    ideal = common + (len(coder) - common + 1) + (len(tester) - common + 1) + len(rests) * 2
    assert driven.engine.totals.prefill_tokens == ideal


def test_turns_of_two_tenants_never_share_or_wait_for_each_other():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10)
    turns = [driven.turn(f"a{n}", PREFIX + str(n), tenant=f"tenant{n}") for n in range(3)]
    driven.steps(1)
    assert running(driven) == {"a0", "a1", "a2"}
    driven.settle()
    assert all(turn.end and turn.end.cached_tokens == 0 for turn in turns)


def test_other_turns_go_on_while_a_group_waits_for_its_prefix():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, step_tokens=40)
    driven.turn("first", PREFIX + "1")
    driven.turn("second", PREFIX + "2")
    driven.turn("unlike", "something else, of the same tenant")
    driven.turn("other", "something else, of another tenant", tenant="u")
    driven.steps(1)
    assert running(driven) == {"first", "unlike", "other"}


def test_the_wait_for_a_prefix_is_bounded():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, group_wait_steps=3, mixed_prefill_tokens=1)
    driven.turn("busy", "x", tokens=500)  # its outputs leave the prefix one token a step
    driven.steps(2)
    driven.turn("first", PREFIX + "1")
    second = driven.turn("second", PREFIX + "2")
    driven.steps(3)
    assert "second" not in running(driven)
    driven.steps(1)
    assert "second" in running(driven)
    driven.settle()
    assert second.text == driven.runner.expected_output(PREFIX + "2", 5)


def test_with_no_wait_allowed_everyone_computes_alone():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, group_wait_steps=0)
    for n in range(3):
        driven.turn(f"a{n}", PREFIX + str(n))
    driven.settle()
    assert driven.engine.totals.prefill_tokens == 3 * (len(PREFIX) + 1)


@pytest.mark.parametrize("how", ["cancelled", "held"])
def test_when_the_one_that_computes_stops_the_next_takes_over_from_there(how):
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, step_tokens=40)
    first = driven.turn("first", PREFIX + "1")
    others = [driven.turn(name, PREFIX + name) for name in ("2", "3")]
    driven.steps(2)
    assert running(driven) == {"first"}
    if how == "cancelled":
        assert first.id is not None
        driven.engine.cancel(first.id)
    else:
        driven.engine.direct(
            ask.Hold(
                directive_id="h",
                deadline_ns=driven.now_ns + SECOND,
                session_id=SessionId("first"),
                ttl_ns=1000 * SECOND,
            )
        )
    driven.settle()
    for name, turn in zip(("2", "3"), others, strict=True):
        assert turn.text == driven.runner.expected_output(PREFIX + name, 5)
    assert others[0].end is not None
    assert others[0].end.cached_tokens == 80, "what the first had computed in two steps"
    assert driven.engine.totals.prefill_tokens == len(PREFIX) + 2


def test_a_turn_with_a_wished_time_waits_only_for_one_that_has_such_a_wish():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, step_tokens=40)
    driven.turn("calm", PREFIX + "1")
    driven.turn("urgent", PREFIX + "2", slo=Slo(ttft_ns=SECOND))
    driven.turn("urgent too", PREFIX + "3", slo=Slo(ttft_ns=SECOND))
    driven.steps(1)
    # The urgent one is first in the order; both others can then wait for it.
    assert running(driven) == {"urgent"}
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, step_tokens=40)
    driven.turn("calm", PREFIX + "1")
    driven.steps(1)
    driven.turn("urgent", PREFIX + "2", slo=Slo(ttft_ns=SECOND))
    driven.steps(1)
    assert running(driven) == {"calm", "urgent"}


def test_members_of_a_group_enter_next_to_each_other_but_never_overtake_for_good():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10, max_running=1)
    order: list[str] = []

    def run(count: int) -> None:
        for _ in range(count):
            driven.steps(1)
            order.extend(name for name in sorted(running(driven)) if name not in order)

    for name in ("g1", "x", "g2"):
        driven.turn(name, (PREFIX if name.startswith("g") else "") + name, tokens=2)
        driven.advance(0.001)
    for n in range(3, 12):  # and the group's stream does not end
        run(1)
        driven.turn(f"g{n}", PREFIX + f"g{n}", tokens=2)
        driven.advance(0.001)
    run(40)
    assert order[:2] == ["g1", "x"], "once the only older member has entered, it is x's turn"
    assert len(order) == 12


def test_a_shared_prefix_is_charged_to_its_tenant_once_and_its_cells_are_split():
    driven = Driven(kv_tokens=2000, share_prefix_tokens=10)
    for n in range(4):
        driven.turn(f"a{n}", PREFIX + str(n), tokens=3)
    driven.settle()
    assert driven.engine._scheduler.service.counter(TenantId("t")) == len(PREFIX) + 4 * 1 + 4 * 3 * 2.0
    occupancy = driven.engine._reporter.occupancy()
    own = 1 + 2  # its own last prompt token, and outputs but the last
    assert [s.charged_tokens for s in occupancy.sessions] == [pytest.approx(len(PREFIX) / 4 + own)] * 4
    assert sum(s.charged_tokens for s in occupancy.sessions) == pytest.approx(occupancy.device_used_tokens)


def test_the_service_gap_of_backlogged_tenants_stays_within_vtcs_bound_although_one_has_groups():
    kv_tokens, prompt_tokens = 700, len(PREFIX) + 3
    runner = FakeRunner(physical_tokens=4 * kv_tokens)  # the fake has each shared cell as often as it has users
    driven = Driven(kv_tokens=kv_tokens, runner=runner, share_prefix_tokens=10, max_running=4)
    left = {"grouped": 300, "plain": 300}
    under_way: dict[str, list[DrivenTurn]] = {"grouped": [], "plain": []}
    service = driven.engine._scheduler.service
    bound = 2 * max(prompt_tokens, 2 * kv_tokens)
    gap = 0.0
    while all(left.values()):
        for tenant, turns in under_way.items():
            turns[:] = [turn for turn in turns if turn.end is None]
            while len(turns) < 6 and left[tenant]:
                left[tenant] -= 1
                number = f"{left[tenant]:03}"
                prompt = PREFIX + number if tenant == "grouped" else number + PREFIX
                turns.append(driven.turn(f"{tenant}{number}", prompt, 20, tenant, ephemeral=True))
        driven.steps(1)
        gap = max(gap, abs(service.counter(TenantId("grouped")) - service.counter(TenantId("plain"))))
    assert driven.engine.totals.shared_tokens > 0
    assert min(service.counters().values()) > 3 * bound, "long enough for the gap to have passed the bound"
    assert gap <= bound


def test_a_prefix_is_shared_where_room_is_short_instead_of_held_twice():
    driven = Driven(kv_tokens=300, runner=FakeRunner(physical_tokens=2000), share_prefix_tokens=10)
    assert len(PREFIX) == 188
    turns = [driven.turn(f"a{n}", PREFIX + str(n), tokens=10) for n in range(6)]
    driven.steps(3)
    assert len(running(driven)) == 6, "six prompts of 189 tokens, of which 188 are common"
    driven.settle()
    assert driven.engine.totals.preempted_count == 0
    assert all(turn.text == driven.runner.expected_output(PREFIX + str(n), 10) for n, turn in enumerate(turns))


def waiting_turns(count: int) -> tuple[Scheduler, list[Turn]]:
    """So many turns of 2,000 tokens of one tenant, 1,500 of them common, just submitted."""
    ledger = Ledger(device_capacity_tokens=100_000, slot_count=32, bytes_per_token=1)
    scheduler = Scheduler(SchedulerConfig(share_prefix_tokens=32), ledger, physical_tokens=100_000)
    turns = []
    for n in range(count):
        tokens = [i * 7 % 40_000 for i in range(1500)] + [(i + n * 13) % 40_000 for i in range(500)]
        session = Session(SessionId(f"s{n}"), TenantId("t"), tokens=tokens)
        turns.append(Turn(TurnId(str(n)), session.id, session.tenant_id, n, 2000, 50))
        scheduler.submit(session, turns[-1])
    return scheduler, turns


def test_five_hundred_waiting_turns_cost_a_step_less_than_a_millisecond():
    """CPU time of all that grouping adds to a step, from the first on, where everyone chooses whom to wait for."""
    best_ns = [10**9] * 10
    for _ in range(4):
        scheduler, turns = waiting_turns(500)
        scheduler.plan(0)
        assert len(scheduler.running) == 1
        for turn in turns:
            if (member := scheduler.groups._members.get(turn.session_id)) is not None:
                member.leader = None  # as before the plan: nobody has chosen yet
        for step in range(10):
            began = time.thread_time_ns()
            scheduler.groups.begin_step()
            passed = [scheduler.groups.passes_over(turn) for turn in turns[1:]]
            for turn in turns:
                scheduler.groups.standing_ns(turn)
            best_ns[step] = min(best_ns[step], time.thread_time_ns() - began)
            assert all(passed)
    assert max(best_ns) < 1_000_000


def test_a_group_that_has_gone_leaves_nothing_behind():
    scheduler, turns = waiting_turns(5)
    scheduler.plan(0)
    groups: PrefixGroups = scheduler.groups
    groups.check_integrity()
    for turn in turns:
        scheduler.finish(turn.session_id, 1, completed=False)
        groups.check_integrity()
    assert not groups._groups
    assert not groups._members


@pytest.mark.engine
def test_the_real_model_computes_a_common_prompt_once_for_all_its_agents(make_runner, model):
    runner = make_runner(mode=ContextMode.UNIFIED, kv_tokens=1024, slot_count=4)
    config = EngineConfig(kv_tokens=1024, scheduler=SchedulerConfig(step_tokens=64, share_prefix_tokens=8))
    engine = Engine(model, runner, config)
    prompts = [f"{PREFIX}You are agent number {n}." for n in range(4)]
    ends: list[TurnFinished] = []

    def sink(event: TurnEvent) -> None:
        if isinstance(event, TurnFinished):
            ends.append(event)

    for n, prompt in enumerate(prompts):
        engine.submit(TurnRequest(SessionId(f"agent-{n}"), TenantId("t"), prompt, max_tokens=2), sink)
    for _ in range(40):
        engine.cycle()
        engine._ledger.check_integrity()
    tokens = [model.tokenize(prompt) for prompt in prompts]
    common = min(common_prefix(tokens[0], other) for other in tokens[1:])
    assert len(ends) == 4
    assert common > 3 * (len(tokens[0]) - common)
    assert engine.totals.prefill_tokens == common + sum(len(each) - common for each in tokens)
