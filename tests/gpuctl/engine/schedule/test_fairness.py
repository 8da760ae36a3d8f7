"""Tenants beside each other, over the fake runner: service and places by weight."""

from __future__ import annotations

import pytest
from equipoise.gpuctl import directives as ask
from equipoise.gpuctl.engine.schedule.sequence import TenantId
from equipoise.tests.gpuctl.engine.driving import SECOND, Driven


def test_tenants_share_service_by_weight_while_both_are_backlogged():
    driven = Driven(kv_tokens=1000, max_running=1)
    driven.engine.direct(
        ask.SetTenantWeight(
            directive_id="w", deadline_ns=driven.now_ns + SECOND, tenant_id=TenantId("heavy"), weight=3.0
        )
    )
    turns = [
        (tenant, driven.turn(f"{tenant}{n}", "p" * 10, 10, tenant)) for n in range(40) for tenant in ("heavy", "light")
    ]
    driven.steps(220)
    done = {"heavy": 0, "light": 0}
    for tenant, turn in turns:
        done[tenant] += turn.end is not None
    assert done["light"] >= 3
    assert done["heavy"] / done["light"] == pytest.approx(3.0, rel=0.35)


def test_a_tenant_that_was_idle_cannot_claim_what_it_did_not_use():
    driven = Driven(kv_tokens=1000, max_running=1)
    for number in range(10):
        driven.complete(f"busy{number}", "p" * 10, tokens=10, tenant="busy", ephemeral=True)
    late = [driven.turn(f"late{n}", "p" * 10, 10, "late", ephemeral=True) for n in range(10)]
    busy = [driven.turn(f"again{n}", "p" * 10, 10, "busy", ephemeral=True) for n in range(10)]
    driven.steps(1)
    driven.steps(120)
    finished = (sum(t.end is not None for t in late), sum(t.end is not None for t in busy))
    assert min(finished) >= 3, finished


def test_a_tenant_below_its_share_of_the_places_takes_one_from_a_flood():
    driven = Driven(kv_tokens=1000, max_running=4)
    flood = [driven.turn(f"flood{n}", "p" * 10, 200, "flood") for n in range(8)]
    driven.steps(5)
    modest = driven.turn("modest", "q" * 10, 5, "modest")
    driven.steps(8)
    assert modest.end is not None, "it waited for a turn of the flood to end"
    assert driven.engine.totals.swap_out_count == 0, "the paused turn's KV stays where it is"
    driven.settle(5000)
    for turn in flood:
        assert turn.text == driven.runner.expected_output("p" * 10, 200)


def test_equal_tenants_do_not_trade_a_place_back_and_forth():
    driven = Driven(kv_tokens=1000, max_running=3)
    for n in range(4):
        driven.turn(f"a{n}", "p" * 10, 60, "a")
        driven.turn(f"b{n}", "q" * 10, 60, "b")
    driven.steps(3)
    running = set(driven.engine._scheduler.running)
    driven.steps(20)
    assert set(driven.engine._scheduler.running) == running
