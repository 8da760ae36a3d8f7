"""decide(): from one snapshot to decisions, each with its reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.actions import Decision, Drop, Grant, Retain, SetTenantWeight, SwapIn, SwapOut
from equipoise.policies.decide import decide
from equipoise.policies.kv.economy import SCARCE_RATIO
from equipoise.policies.model import (
    MIB,
    CostModel,
    Engine,
    KvTier,
    Session,
    SessionPhase,
    TenantId,
    ToolCall,
    ToolCallPhase,
    Verdict,
)
from equipoise.policies.policy import KvPart, KvPolicy, Policy
from equipoise.policies.snapshot import Snapshot
from equipoise.tests.policies.facts import ENGINE, call, engine, host, ns, policy, session, snapshot, stopped

POLICY = replace(policy(pool_mib=65_536), kv=KvPolicy())
CROWDED = engine(
    used_tokens=90_000,
    capacity_tokens=100_000,
    bytes_per_token=20_000,
    cost=CostModel(prefill_seconds_per_token=0.01, host_bytes_per_second=4e9),
)
"""Nine tenths full: the price of the device is 27."""
EMPTY = replace(CROWDED, device_used_tokens=1000)
LONG = call(expected_ns=ns(60), expected_bytes=64 * MIB)
"""A pytest that has declared a minute."""


def look(
    now_s: float,
    held: Session | None = None,
    tool: ToolCall | None = LONG,
    on: Engine = CROWDED,
    of: Policy = POLICY,
    **more: object,
) -> Snapshot:
    more.setdefault("weights_told", frozenset((e, t.id, t.weight) for e in (on.id,) for t in of.tenants))
    return snapshot(
        now_s,
        of,
        tool_calls=(tool,) if tool else (),
        sessions=(held or session(),),
        engines=(on,),
        **more,
    )


def asked(now_s: float, held: Session | None = None, **more: object) -> Decision | None:
    made = decide(look(now_s, held, **more), POLICY)  # type: ignore[arg-type]
    assert len(made) <= 1
    return made[0] if made else None


# -- keep, swap or drop


def test_kv_of_a_long_call_on_a_crowded_device_is_swapped_out() -> None:
    decision = asked(1.0)
    assert decision is not None
    assert decision.action == SwapOut(ENGINE, session().id, KvTier.HOST, ns(6))
    assert decision.rule == "swap is the cheapest"
    assert decision.subject == "s1 during pytest"
    assert decision.unit == "GiB s"


def test_kv_is_moved_only_to_tiers_that_the_policy_allows() -> None:
    with_disk = replace(CROWDED, disk_capacity_bytes=1 << 40, cost=replace(CROWDED.cost, disk_bytes_per_second=1e9))
    places = {}
    for tiers in ((KvTier.HOST, KvTier.DISK), (KvTier.DISK,), ()):
        of = replace(POLICY, kv=replace(POLICY.kv, tiers=frozenset(tiers)))
        (made,) = decide(look(1.0, on=with_disk, of=of), of)
        places[tiers] = made.action.tier if isinstance(made.action, SwapOut) else type(made.action)
    assert places == {(KvTier.HOST, KvTier.DISK): KvTier.HOST, (KvTier.DISK,): KvTier.DISK, (): Drop}


def test_kv_on_a_device_with_room_is_retained() -> None:
    decision = asked(1.0, on=EMPTY)
    assert decision is not None
    assert decision.action == Retain(ENGINE, session().id, ns(10), ns(6))


def test_kv_is_dropped_where_computing_it_again_is_cheapest() -> None:
    fast = replace(CROWDED, cost=CostModel(prefill_seconds_per_token=1e-9, host_bytes_per_second=1e6))
    decision = asked(1.0, on=fast)
    assert decision is not None
    assert decision.action == Drop(ENGINE, session().id, 0, ns(6))


def test_the_reasons_are_told_with_the_chosen_first_and_the_rest_by_cost() -> None:
    decision = asked(1.0)
    assert decision is not None
    names = [c.name for c in decision.candidates]
    assert names[0] == "swap" and set(names) == {"swap", "keep", "drop"}
    assert decision.measurement == decision.candidates[0].cost
    assert decision.threshold == decision.candidates[1].cost, "what it was measured against is the runner-up"
    assert "59.0 s more" in decision.evidence and "90% full" in decision.evidence


def test_a_short_tool_call_causes_no_decision() -> None:
    assert asked(0.249) is None
    assert asked(0.25) is not None


@pytest.mark.parametrize("phase", [SessionPhase.RUNNING, SessionPhase.WAITING, SessionPhase.HELD])
def test_a_session_that_is_not_idle_is_left_alone(phase: SessionPhase) -> None:
    assert asked(1.0, session(phase=phase)) is None


def test_a_session_without_a_tool_call_is_left_alone() -> None:
    assert asked(1.0, tool=None) is None


def test_a_session_that_holds_nothing_is_left_alone() -> None:
    assert asked(1.0, session(held_tokens=0, tier=KvTier.NONE)) is None


def test_a_detached_engine_is_asked_nothing() -> None:
    assert asked(1.0, on=replace(CROWDED, attached=False)) is None


def test_the_session_waits_for_its_longest_running_call() -> None:
    long, short = call(1, start_s=0.0, kind="pytest"), call(2, start_s=0.9, kind="git")
    seen = replace(look(1.0), tool_calls=(long, short))
    (decision,) = decide(seen, POLICY)
    assert decision.subject == "s1 during pytest"


# -- not too often


def test_a_verdict_in_force_is_not_repeated() -> None:
    swapped = session(verdict=Verdict.SWAP_HOST, verdict_ns=ns(1))
    assert asked(9.0, swapped) is None
    assert asked(9.0, replace(swapped, tier=KvTier.HOST)) is None


def test_a_verdict_stands_for_the_dwell() -> None:
    kept = session(verdict=Verdict.KEEP, verdict_ns=ns(1), retain_until_ns=ns(11))
    assert asked(2.9, kept) is None
    decision = asked(3.0, kept)
    assert decision is not None and isinstance(decision.action, SwapOut)


def test_an_engine_that_refused_is_not_asked_again_within_the_dwell() -> None:
    refused = session(verdict=None, verdict_ns=ns(1))
    assert asked(2.9, refused) is None
    assert asked(3.0, refused) is not None


def test_a_verdict_stays_where_nothing_is_cheaper_by_the_margin() -> None:
    for tokens in range(5_000, 60_000, 250):
        keeps = asked(5.0, on=replace(EMPTY, device_used_tokens=tokens, waiting_count=1))
        assert keeps is not None
        if isinstance(keeps.action, Retain) and keeps.rule.startswith("keep stands"):
            assert keeps.candidates[0].name == "keep" and keeps.candidates[1].cost < keeps.candidates[0].cost
            break
    else:
        pytest.fail("no occupancy at which the margin decides")


def test_a_retention_is_renewed_before_it_ends() -> None:
    kept = session(verdict=Verdict.KEEP, verdict_ns=ns(1), retain_until_ns=ns(11))
    assert asked(10.4, kept, on=EMPTY) is None
    renewed = asked(10.5, kept, on=EMPTY)
    assert renewed is not None and isinstance(renewed.action, Retain)


# -- prices move


def test_a_stopped_call_demotes_the_kv_of_its_session() -> None:
    running = replace(LONG, expected_ns=ns(1.2))
    gentle = replace(EMPTY, device_used_tokens=50_000, waiting_count=1)
    kept = asked(1.0, on=gentle, tool=running)
    assert kept is not None and isinstance(kept.action, Retain)
    waiting = replace(
        running, phase=ToolCallPhase.STOPPED, stopped_ns=ns(1), phase_since_ns=ns(1), waiting_until_ns=ns(21)
    )
    seen = replace(look(1.0, on=gentle, tool=waiting), host=snapshot().host)
    actions = [type(d.action) for d in decide(seen, POLICY)]
    assert actions == [Grant, SwapOut]


def test_a_squeeze_of_host_memory_drops_what_was_swapped_there() -> None:
    swapped = session(tier=KvTier.HOST, host_bytes=20 * MIB, verdict=Verdict.SWAP_HOST, verdict_ns=ns(1))
    assert asked(5.0, swapped) is None
    burst = call(2, session="other", used_mib=65_000, hard_mib=0)
    seen = replace(look(5.0, swapped), tool_calls=(LONG, burst))
    (decision,) = decide(seen, POLICY)
    assert isinstance(decision.action, Drop)


def test_a_squeeze_of_host_memory_moves_it_to_disk_where_there_is_one() -> None:
    with_disk = replace(CROWDED, disk_capacity_bytes=1 << 40, cost=replace(CROWDED.cost, disk_bytes_per_second=1e9))
    swapped = session(tier=KvTier.HOST, host_bytes=20 * MIB, verdict=Verdict.SWAP_HOST, verdict_ns=ns(1))
    burst = call(2, session="other", used_mib=65_000, hard_mib=0)
    (decision,) = decide(replace(look(5.0, swapped, on=with_disk), tool_calls=(LONG, burst)), POLICY)
    assert decision.action == SwapOut(ENGINE, swapped.id, KvTier.DISK, ns(10))


def idle_on_the_host_tier(tools_mib: int) -> Snapshot:
    """24 sessions of 5,000 MiB each wait for calls of 20 s; tools hold so much of 240,000 MiB."""
    count, size = 24, 5_000 * MIB
    on = engine(
        bytes_per_token=size // 40_000,
        host_capacity_bytes=count * size,
        host_used_bytes=count * size,
        cost=CostModel(5e-5, 6e-10, host_bytes_per_second=25e9),
    )
    sessions = tuple(session(f"s{n:02}", held_tokens=40_000, tier=KvTier.HOST, host_bytes=size) for n in range(count))
    calls = tuple(
        replace(call(n + 1, session=f"s{n:02}", kind=f"k{n}", expected_bytes=1), expected_ns=ns(20))
        for n in range(count)
    )
    used = replace(calls[0], used_bytes=tools_mib * MIB, peak_bytes=tools_mib * MIB, hard_bytes=0)
    told = frozenset({(ENGINE, TenantId("gold"), 1.0), (ENGINE, TenantId("silver"), 1.0)})
    big = host(400_000, 100_000)
    return snapshot(5.0, engines=(on,), sessions=sessions, tool_calls=(used, *calls[1:]), weights_told=told, host=big)


@pytest.mark.parametrize("tools_mib", [60_000, 100_000, 120_000, 130_000])
def test_a_step_of_pressure_moves_what_is_needed_and_little_more(tools_mib: int) -> None:
    whole = policy(pool_mib=240_000)
    raised = [type(d.action) for d in decide(idle_on_the_host_tier(tools_mib), whole)]
    of = replace(whole, kv=replace(whole.kv, without=frozenset({KvPart.RAISE})))
    moved = [d for d in decide(idle_on_the_host_tier(tools_mib), of) if isinstance(d.action, Drop)]
    need = max(0, tools_mib + 120_000 - int(SCARCE_RATIO * 240_000))
    assert need <= 5_000 * len(moved) <= need + 5_000
    assert raised == [SwapIn] * len(moved), "the device is empty: nothing needs to be dropped"
    herd = replace(of, kv=replace(of.kv, without=frozenset(KvPart) - {KvPart.COPIES}))
    dropped = [d for d in decide(idle_on_the_host_tier(tools_mib), herd) if isinstance(d.action, Drop)]
    assert len(dropped) == 24, "at one set of prices all would go"


def test_room_in_the_host_tier_is_given_out_once() -> None:
    held = 1000 * CROWDED.bytes_per_token
    tight = replace(CROWDED, host_capacity_bytes=held + held // 2)
    calls = tuple(replace(call(i, session=f"s{i}"), expected_ns=ns(60)) for i in (1, 2))
    sessions = (session("s1"), session("s2"))
    seen = replace(look(1.0, on=tight), tool_calls=calls, sessions=sessions)
    swaps = [d for d in decide(seen, POLICY) if isinstance(d.action, SwapOut)]
    assert [d.action.session for d in swaps if isinstance(d.action, SwapOut)] == ["s1"]


# -- bringing back


ENDED = replace(LONG, phase=ToolCallPhase.ENDED, end_ns=ns(4), gone_ns=ns(4))
OUT = session(tier=KvTier.HOST, verdict=Verdict.SWAP_HOST, verdict_ns=ns(1))


def test_swapped_kv_comes_back_when_the_tool_call_has_ended() -> None:
    decision = asked(4.1, OUT, tool=ENDED)
    assert decision is not None
    assert decision.action == SwapIn(ENGINE, OUT.id, ns(9.1))


@pytest.mark.parametrize(
    "held",
    [
        replace(OUT, tier=KvTier.DEVICE),
        replace(OUT, tier=KvTier.NONE),
        replace(OUT, verdict=Verdict.KEEP),
        replace(OUT, verdict=None),
        replace(OUT, verdict_ns=ns(4.05)),
    ],
)
def test_nothing_comes_back_that_was_not_swapped_for_this_call(held: Session) -> None:
    assert asked(4.1, held, tool=ENDED) is None


def test_nothing_comes_back_while_another_call_of_the_session_runs() -> None:
    running = call(2, start_s=4.0)
    seen = replace(look(4.1, OUT, tool=ENDED), tool_calls=(ENDED, running))
    assert not any(isinstance(d.action, SwapIn) for d in decide(seen, POLICY))


def test_only_as_much_comes_back_as_fits() -> None:
    sessions = tuple(replace(OUT, id=session(f"s{i}").id, held_tokens=600) for i in (1, 2))
    calls = tuple(replace(ENDED, id=call(i).id, session=session(f"s{i}").id) for i in (1, 2))
    tight = replace(CROWDED, device_used_tokens=99_000)
    made = decide(replace(look(4.1, on=tight), sessions=sessions, tool_calls=calls), POLICY)
    assert [d.action for d in made] == [SwapIn(ENGINE, sessions[0].id, ns(9.1))]


# -- weights and directives the engine does not know


def test_each_weight_is_told_once() -> None:
    of = policy(tenants={"gold": 4.0, "silver": 1.0})
    told = frozenset({(ENGINE, TenantId("gold"), 4.0), (ENGINE, TenantId("silver"), 2.0)})
    made = decide(snapshot(1.0, of, engines=(EMPTY,), weights_told=told), of)
    assert [d.action for d in made] == [SetTenantWeight(ENGINE, TenantId("silver"), 1.0, ns(6))]


@pytest.mark.parametrize("directive", ["swap_out", "retain", "swap_in", "drop", "set_tenant_weight"])
def test_an_engine_is_never_asked_for_what_it_cannot_do(directive: str) -> None:
    names = {
        SwapOut: "swap_out",
        Retain: "retain",
        SwapIn: "swap_in",
        Drop: "drop",
        SetTenantWeight: "set_tenant_weight",
    }
    situations = [
        look(1.0, weights_told=frozenset()),
        look(1.0, on=EMPTY),
        look(4.1, OUT, tool=ENDED),
        look(1.0, on=replace(CROWDED, cost=CostModel(prefill_seconds_per_token=1e-9, host_bytes_per_second=1e6))),
    ]
    asked_before, asked_after = set(), set()
    for seen in situations:
        (on,) = seen.engines
        less = replace(on, supported_directives=on.supported_directives - {directive})
        asked_before |= {names[type(d.action)] for d in decide(seen, POLICY)}
        asked_after |= {names[type(d.action)] for d in decide(replace(seen, engines=(less,)), POLICY)}
    assert directive in asked_before
    assert directive not in asked_after


# -- the whole


def test_stopped_calls_come_before_kv_and_kv_before_weights() -> None:
    seen = replace(look(1.0, weights_told=frozenset()), tool_calls=(LONG, stopped(2, session="other")))
    kinds = [type(d.action) for d in decide(seen, POLICY)]
    assert kinds == [Grant, SwapOut, SetTenantWeight, SetTenantWeight]


def test_decisions_of_one_moment_have_ids_of_their_own() -> None:
    made = decide(look(1.0, weights_told=frozenset()), POLICY)
    assert len({d.id for d in made}) == len(made) == 3
    assert {d.at_ns for d in made} == {ns(1)}


def test_an_empty_host_needs_nothing() -> None:
    assert decide(snapshot(1.0), policy()) == ()


# -- sessions whose sandbox is gone


def test_kv_that_nobody_will_claim_is_dropped_at_once() -> None:
    decision = asked(1.0, tool=None, left_behind=frozenset({session().id}))
    assert decision is not None
    assert decision.action == Drop(ENGINE, session().id, 0, ns(6))
    assert decision.rule == "session's sandbox has been removed"


def test_dropping_what_nobody_will_claim_is_asked_once_a_dwell() -> None:
    behind = frozenset({session().id})
    assert asked(5.0, session(verdict=Verdict.DROP, verdict_ns=ns(1)), tool=None, left_behind=behind) is None
    refused = session(verdict=None, verdict_ns=ns(1))
    assert asked(2.9, refused, tool=None, left_behind=behind) is None
    assert asked(3.0, refused, tool=None, left_behind=behind) is not None
