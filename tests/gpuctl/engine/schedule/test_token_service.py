"""Service counters of tenants (VTC)."""

from __future__ import annotations

from equipoise.gpuctl.engine.schedule.sequence import TenantId
from equipoise.gpuctl.engine.schedule.token_service import TokenService


def test_a_returning_tenant_starts_at_the_least_counter_of_the_active():
    service = TokenService()
    busy, late = TenantId("busy"), TenantId("late")
    service.arrive(busy)
    service.charge_input(busy, 100)
    service.charge_output(busy, 50)
    assert service.counter(busy) == 200
    service.arrive(late)
    assert service.counter(late) == 200


def test_weight_divides_what_is_charged():
    service = TokenService()
    service.set_weight(TenantId("a"), 4)
    service.charge_output(TenantId("a"), 10)
    assert service.counter(TenantId("a")) == 5
