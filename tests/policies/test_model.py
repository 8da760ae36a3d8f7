"""Arithmetic of the facts on their own fields."""

from __future__ import annotations

import dataclasses
from enum import Enum

import pytest
from equipoise.policies import actions, events, model
from equipoise.policies.model import CostModel, Host, KvTier
from equipoise.policies.policy import Budget, MemoryPolicy
from equipoise.tests.policies.facts import call, engine, ns, sandbox, session


def test_a_sandbox_is_called_by_tenant_and_name() -> None:
    assert sandbox(tenant="gold", name="ada").label == "gold/ada"


def test_a_call_runs_until_it_has_an_end() -> None:
    assert call().running
    assert not call(end_ns=5).running


def test_elapsed_time_stops_at_the_end_and_never_goes_below_zero() -> None:
    assert call(start_s=1).elapsed_ns(ns(3)) == ns(2)
    assert call(start_s=1, end_ns=ns(2)).elapsed_ns(ns(9)) == ns(1)
    assert call(start_s=5).elapsed_ns(ns(3)) == 0


def test_prefill_time_has_a_linear_and_a_quadratic_part() -> None:
    cost = CostModel(prefill_seconds_per_token=0.01, prefill_seconds_per_token2=0.001)
    assert cost.prefill_seconds(10) == pytest.approx(0.1 + 0.1)
    assert CostModel().prefill_seconds(1000) == 0.0


def test_an_engine_without_capacity_is_not_full() -> None:
    assert engine(used_tokens=50, capacity_tokens=100).device_used_ratio == 0.5
    assert engine(used_tokens=0, capacity_tokens=0).device_used_ratio == 0.0


@pytest.mark.parametrize(("tier", "tokens"), [(KvTier.DEVICE, 1000), (KvTier.HOST, 0), (KvTier.DISK, 0)])
def test_only_a_session_on_the_device_takes_device_tokens(tier: KvTier, tokens: int) -> None:
    assert session(held_tokens=1000, tier=tier).device_tokens() == tokens


def test_a_host_that_was_never_sampled_is_not_full() -> None:
    assert Host().used_ratio == 0.0
    assert Host(memory_total_bytes=100, memory_available_bytes=25).used_ratio == 0.75


def test_a_kind_without_a_budget_of_its_own_has_the_common_one() -> None:
    memory = MemoryPolicy(budget=Budget(1, 2), kind_budgets=(("pytest", Budget(3, 4)),))
    assert memory.budget_for("pytest") == Budget(3, 4)
    assert memory.budget_for("git") == Budget(1, 2)


def test_the_pool_is_a_share_of_the_host_unless_it_is_given() -> None:
    assert MemoryPolicy(tool_pool_ratio=0.5).pool_bytes(1000) == 500
    assert MemoryPolicy(tool_pool_bytes=7, tool_pool_ratio=0.5).pool_bytes(1000) == 7


@pytest.mark.parametrize("module", [model, events, actions])
def test_facts_are_frozen_and_slotted(module: object) -> None:
    classes = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and not issubclass(each, Enum)  # type: ignore[attr-defined]
    ]
    assert classes
    for each in classes:
        assert dataclasses.is_dataclass(each), each
        assert each.__dataclass_params__.frozen, each  # type: ignore[attr-defined]
        assert hasattr(each, "__slots__"), each
