"""Weighted dominant shares over host memory and KV."""

from __future__ import annotations

from typing import Any

import pytest
from equipoise.policies.fairness import gap, serve_order, shares
from equipoise.policies.model import MIB, KvTier, TenantId, ToolCallPhase
from equipoise.policies.policy import Policy
from equipoise.policies.snapshot import Snapshot
from equipoise.tests.policies.facts import call, engine, policy, session, snapshot

A, B = TenantId("a"), TenantId("b")


def mixed(
    of: Policy, *, tool_mib: dict[str, int], kv_tokens: dict[str, int], capacity_tokens: int = 18_000
) -> Snapshot:
    return snapshot(
        of=of,
        tool_calls=tuple(call(i, tenant, used_mib=mib) for i, (tenant, mib) in enumerate(tool_mib.items(), 1)),
        sessions=tuple(session(f"s-{t}", t, held_tokens=tokens) for t, tokens in kv_tokens.items()),
        engines=(engine(capacity_tokens=capacity_tokens),),
    )


def test_the_papers_example_is_fair() -> None:
    """Ghodsi et al., figure 1: <9 CPU, 18 GB>, A takes <1, 4> a task, B <3, 1>; A gets 3 tasks, B 2.

    CPUs stand here as device KV and the 18 GB as the tool pool: both dominant shares are 2/3.
    """
    of = policy(pool_mib=18, tenants={"a": 1.0, "b": 1.0})
    seen = mixed(of, tool_mib={"a": 3 * 4, "b": 2 * 1}, kv_tokens={"a": 3 * 1, "b": 2 * 3}, capacity_tokens=9)
    by_tenant = shares(seen, of)
    assert by_tenant[A].dominant == by_tenant[B].dominant == pytest.approx(2 / 3)
    assert (by_tenant[A].resource, by_tenant[B].resource) == ("memory", "kv")
    assert gap(by_tenant) == pytest.approx(0.0)


def test_filling_by_least_dominant_share_reaches_the_papers_allocation() -> None:
    of = policy(pool_mib=18, tenants={"a": 1.0, "b": 1.0})
    tasks = {"a": 0, "b": 0}
    demand = {"a": (1, 4), "b": (3, 1)}
    while True:
        seen = mixed(
            of,
            tool_mib={t: n * demand[t][1] for t, n in tasks.items()},
            kv_tokens={t: n * demand[t][0] for t, n in tasks.items()},
            capacity_tokens=9,
        )
        chosen = serve_order(shares(seen, of))[0]
        tasks[chosen] += 1
        if sum(n * demand[t][0] for t, n in tasks.items()) > 9 or sum(n * demand[t][1] for t, n in tasks.items()) > 18:
            tasks[chosen] -= 1
            break
    assert tasks == {"a": 3, "b": 2}


def test_a_tenant_of_weight_two_is_owed_twice_as_much() -> None:
    of = policy(pool_mib=100, tenants={"a": 2.0, "b": 1.0})
    by_tenant = shares(mixed(of, tool_mib={"a": 40, "b": 20}, kv_tokens={}), of)
    assert by_tenant[A].weighted == by_tenant[B].weighted == pytest.approx(0.2)
    assert gap(by_tenant) == pytest.approx(0.0)


def test_the_least_served_comes_first_and_ties_go_by_name() -> None:
    of = policy(pool_mib=100, tenants={"c": 1.0, "b": 1.0, "a": 1.0})
    by_tenant = shares(mixed(of, tool_mib={"a": 30}, kv_tokens={}), of)
    assert serve_order(by_tenant) == ["b", "c", "a"]


def test_kv_swapped_to_host_memory_counts_with_the_tools_it_competes_with() -> None:
    of = policy(pool_mib=100, tenants={"a": 1.0})
    seen = snapshot(
        of=of,
        tool_calls=(call(1, "a", used_mib=10),),
        sessions=(session("s", "a", held_tokens=5, tier=KvTier.HOST, host_bytes=30 * MIB),),
        engines=(engine(),),
    )
    share = shares(seen, of)[A]
    assert share.dominant == pytest.approx(0.4)
    assert (share.memory_bytes, share.kv_host_bytes, share.kv_device_bytes) == (10 * MIB, 30 * MIB, 0)


def test_an_escapee_counts_and_what_is_gone_does_not() -> None:
    of = policy(pool_mib=100, tenants={"a": 1.0, "b": 1.0})
    over: dict[str, Any] = {"phase": ToolCallPhase.ENDED, "end_ns": 5}
    calls = (call(1, "a", used_mib=10, **over), call(2, "b", used_mib=10, gone_ns=6, **over))
    by_tenant = shares(snapshot(of=of, tool_calls=calls), of)
    assert by_tenant[A].dominant == pytest.approx(0.1)
    assert by_tenant[B].dominant == 0.0


def test_a_tenant_that_left_the_policy_is_still_accounted_for() -> None:
    of = policy(tenants={"a": 1.0})
    calls = (call(1, "stranger", used_mib=10), call(2, "gone", gone_ns=5))
    by_tenant = shares(snapshot(of=of, tool_calls=calls), of)
    assert by_tenant[TenantId("stranger")].weight == 1.0
    assert set(by_tenant) == {"a", "gone", "stranger"}


def test_tenants_without_use_widen_no_gap() -> None:
    of = policy(pool_mib=100, tenants={"a": 1.0, "b": 1.0, "c": 1.0})
    assert gap(shares(mixed(of, tool_mib={"a": 50}, kv_tokens={}), of)) == 0.0
    assert gap(shares(mixed(of, tool_mib={"a": 50, "b": 20}, kv_tokens={}), of)) == pytest.approx(0.3)


def test_without_capacities_nobody_has_a_share() -> None:
    of = policy(tenants={"a": 1.0})
    empty = shares(snapshot(of=of, sessions=(session("s", "a", engine="gone"),)), of)
    assert empty[A].dominant == 0.0
