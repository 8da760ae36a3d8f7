"""Weighted token service per tenant: the virtual counters of VTC.

Owns: one counter per tenant and the lift when a tenant comes back. Must not: know of turns or memory.
Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithms 2 and 4: serve the tenant with
the smallest counter; input tokens weigh 1, output tokens 2; the gap between two backlogged tenants stays below
2 max(w_p L_input, w_q M).

A prefix that several turns share is charged once: to their tenant (cells are never shared across tenants), by the turn
that computes it, as it is computed. The turns that then use its cells are charged their own rest alone. What the shared
cells occupy is split among their users in the occupancy report (Ledger.charged_tokens), not in these counters.
"""

from __future__ import annotations

from .sequence import TenantId

INPUT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0


class TokenService:
    def __init__(self) -> None:
        self._counters: dict[TenantId, float] = {}
        self._weights: dict[TenantId, float] = {}
        self._active: dict[TenantId, int] = {}
        self._last_left: TenantId | None = None

    def weight(self, tenant_id: TenantId) -> float:
        return self._weights.get(tenant_id, 1.0)

    def set_weight(self, tenant_id: TenantId, weight: float) -> None:
        """`weight` must be above 0."""
        self._weights[tenant_id] = weight

    def counter(self, tenant_id: TenantId) -> float:
        """Weighted service received: cost units per unit of weight."""
        return self._counters.get(tenant_id, 0.0)

    def arrive(self, tenant_id: TenantId) -> None:
        """A turn of the tenant arrives. One that was idle is lifted to the least counter among the active, or to that
        of the tenant active last where nobody is.

        Without the lift a tenant could save up service while it sends nothing and then starve the others.
        """
        if not self._active.get(tenant_id):
            active = [self.counter(other) for other, turns in self._active.items() if turns]
            floor = min(active) if active else self.counter(self._last_left) if self._last_left else 0.0
            self._counters[tenant_id] = max(self.counter(tenant_id), floor)
        self._active[tenant_id] = self._active.get(tenant_id, 0) + 1

    def leave(self, tenant_id: TenantId) -> None:
        """A turn of the tenant ended."""
        self._active[tenant_id] -= 1
        self._last_left = tenant_id

    def charge_input(self, tenant_id: TenantId, tokens: int) -> None:
        self._charge(tenant_id, tokens * INPUT_TOKEN_COST)

    def charge_output(self, tenant_id: TenantId, tokens: int) -> None:
        self._charge(tenant_id, tokens * OUTPUT_TOKEN_COST)

    def _charge(self, tenant_id: TenantId, cost: float) -> None:
        self._counters[tenant_id] = self.counter(tenant_id) + cost / self.weight(tenant_id)

    def counters(self) -> dict[TenantId, float]:
        return dict(self._counters)
