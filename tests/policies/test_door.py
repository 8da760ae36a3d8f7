"""The door: who is held when the awake need more than there is, who goes on first, and that nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from equipoise.policies.actions import Hold, Release
from equipoise.policies.decide import decide
from equipoise.policies.door import GROWTH, watch
from equipoise.policies.model import Engine, KvTier, Session, SessionPhase, TenantId
from equipoise.policies.policy import Policy
from equipoise.policies.snapshot import Snapshot
from equipoise.policies.state import State
from equipoise.policies.world.names import plan
from equipoise.policies.world.traces import random_scripts
from equipoise.policies.world.world import World
from equipoise.tests.policies.facts import (
    ADA,
    ENGINE,
    carry_out,
    engine,
    ns,
    observed,
    policy,
    session,
    snapshot,
    state_with_a_call,
    turn_started,
)
from equipoise.tests.policies.simulation import Simulation
from equipoise.tests.policies.world.test_world import TENANTS

ON = engine(capacity_tokens=8_000, host_capacity_bytes=2_000 << 10)
"""Device and host tier hold 10,000 tokens together."""


def of(ratio: float | None = 1.0, **tenants: float) -> Policy:
    made = policy(tenants=tenants or None)
    return replace(made, kv=replace(made.kv, door_ratio=ratio))


def running(id: str, tokens: int) -> Session:
    return session(id, held_tokens=tokens, phase=SessionPhase.RUNNING)


def lost(id: str, tokens: int, asked_s: float = 50.0, **more: object) -> Session:
    """It waits for its turn, and its KV is gone."""
    values: dict[str, object] = {"phase": SessionPhase.WAITING, "tier": KvTier.NONE, "asked_ns": ns(asked_s)}
    return replace(session(id, held_tokens=0), context_tokens=tokens, **(values | more))  # type: ignore[arg-type]


def held(id: str, tokens: int, asked_s: float = 50.0, until_s: float = 109.0, **more: object) -> Session:
    return lost(id, tokens, asked_s, phase=SessionPhase.HELD, hold_until_ns=ns(until_s), **more)


def at_the_door(*sessions: Session, policy: Policy | None = None, on: Engine = ON) -> list[tuple[str, bool]]:
    seen = snapshot(100.0, policy or of(), engines=(on,), sessions=sessions)
    return [(str(p.session.id), p.hold) for p in watch(seen, policy or of(), on)]


def test_a_session_whose_kv_is_gone_or_on_disk_is_held_while_the_awake_need_all_the_room() -> None:
    busy = (running("a", 4_000), running("b", 4_000))
    assert at_the_door(*busy, lost("c", 3_000)) == [("c", True)]
    on_disk = lost("c", 3_000, tier=KvTier.DISK, held_tokens=3_000)
    assert at_the_door(*busy, on_disk) == [("c", True)]
    on_host = replace(on_disk, tier=KvTier.HOST)
    assert at_the_door(*busy, on_host) == [], "it comes back without pushing anybody out"


def test_nobody_is_held_while_there_is_room_or_alone_or_without_a_door() -> None:
    assert at_the_door(running("a", 4_000), lost("c", 3_000)) == []
    assert at_the_door(lost("c", 30_000)) == []
    crowd = (running("a", 9_000), lost("c", 3_000))
    assert at_the_door(*crowd, policy=of(None)) == []
    deaf = replace(ON, supported_directives=ON.supported_directives - {"hold"})
    assert at_the_door(*crowd, on=deaf) == []


def test_as_many_are_held_as_are_needed_who_came_last_first() -> None:
    crowd = (running("a", 6_000), lost("c", 2_000, asked_s=10.0), lost("d", 2_000, asked_s=90.0))
    assert at_the_door(*crowd) == [("d", True)]
    assert GROWTH * (6_000 + 2_000) <= 10_000 < GROWTH * (6_000 + 4_000)


def test_who_has_waited_longest_goes_on_first_and_the_others_as_far_as_the_room_goes() -> None:
    crowd = (running("a", 3_000), held("c", 2_000, asked_s=80.0), held("d", 2_000, asked_s=60.0), held("e", 2_000))
    assert at_the_door(*crowd) == [("e", False), ("d", False)]


def test_a_heavier_tenant_waits_shorter() -> None:
    gold = held("g", 3_000, asked_s=90.0)
    silver = held("s", 3_000, asked_s=80.0, tenant=TenantId("silver"))
    rich = of(gold=4.0, silver=1.0)
    assert at_the_door(running("a", 5_000), gold, silver, policy=rich) == [("g", False)]


def test_a_hold_is_renewed_before_it_ends_and_not_sooner() -> None:
    busy = running("a", 9_000)
    assert at_the_door(busy, held("c", 3_000, until_s=109.0)) == []
    assert at_the_door(busy, held("c", 3_000, until_s=104.0)) == [("c", True)]


def test_nobody_is_held_longer_than_the_policy_allows() -> None:
    made = of()
    short = replace(made, kv=replace(made.kv, door_longest_ns=ns(30)))
    assert at_the_door(running("a", 9_000), held("c", 3_000, asked_s=60.0), policy=short) == [("c", False)]
    assert at_the_door(running("a", 9_000), lost("c", 3_000, asked_s=60.0), policy=short) == []


def test_a_hold_and_its_end_are_decisions_with_their_reasons() -> None:
    seen = snapshot(100.0, of(), engines=(ON,), sessions=(running("a", 9_000), lost("c", 3_000)))
    seen = replace(seen, weights_told=frozenset((ENGINE, t.id, t.weight) for t in of().tenants))
    (hold,) = decide(seen, of())
    assert hold.action == Hold(ENGINE, lost("c", 0).id, of().kv.retain_ns, ns(105))
    assert (hold.measurement, hold.threshold) == (GROWTH * 12_000, 10_000)
    assert "its KV is gone" in hold.evidence
    again: Snapshot = replace(seen, sessions=(running("a", 3_000), held("c", 3_000)))
    (release,) = decide(again, of())
    assert release.action == Release(ENGINE, lost("c", 0).id, ns(105))


def asked_state() -> State:
    state = state_with_a_call()
    state.apply(turn_started(1.0))
    return state


def test_the_state_knows_when_a_turn_was_asked_for_and_until_when_a_session_is_held() -> None:
    state = asked_state()
    carry_out(state, Hold(ENGINE, ADA, ns(10), ns(7)), at_s=2.0)
    assert (state.sessions[ADA].asked_ns, state.sessions[ADA].hold_until_ns) == (ns(1), ns(12))
    state.apply(observed(3.0, session(ADA)))
    assert (state.sessions[ADA].asked_ns, state.sessions[ADA].hold_until_ns) == (ns(1), ns(12))
    carry_out(state, Release(ENGINE, ADA, ns(9)), at_s=4.0, id="d2")
    assert state.sessions[ADA].hold_until_ns == 0


@pytest.mark.parametrize("seed", range(3))
def test_with_a_door_everybody_comes_to_an_end_and_no_law_is_broken(seed: int) -> None:
    scripts = [
        replace(script, turns=tuple(replace(t, output_tokens=1 + t.output_tokens % 20) for t in script.turns))
        for script in random_scripts(seed, 6, TENANTS, turns=6)
    ]
    longest = max(script.peak_tokens for script in scripts)
    made = policy(pool_mib=8_000, tenants={"gold": 2.0, "silver": 1.0})
    made = replace(made, kv=replace(made.kv, door_ratio=0.9))
    simulation = Simulation(scripts, made, device_tokens=int(1.3 * longest), host_bytes=10_000 * 23_040)
    simulation.play(at_most_s=5_000)
    assert simulation.actions(Hold) and simulation.actions(Release)
    assert all(agent.killed_count == 0 for agent in simulation.agents)


def test_with_a_door_less_is_computed_again() -> None:
    from equipoise.policies.world.machine import MACHINES
    from equipoise.policies.world.traces import room_for

    on = replace(MACHINES["h100-8b"], cost=replace(MACHINES["h100-8b"].cost, disk_bytes_per_second=0.0))
    scripts = random_scripts(4, 16, turns=24)
    room = room_for(scripts, on, 0.2, 0.3, 0)
    scores = []
    for name in ("decide", "decide+door"):
        world = World(scripts, on, room, plan(name), steady=True).run(200.0)
        world.measure_from_now()
        scores.append(world.run(900.0).score())
    open_, shut = scores
    assert shut.recomputed_tokens < 0.8 * open_.recomputed_tokens
    assert shut.turns_per_minute > open_.turns_per_minute
