"""Who has how much: weighted dominant resource fairness over RAM and KV.

Owns shares and the order they imply. Source: Ghodsi et al., "Dominant Resource Fairness" (NSDI 2011): a tenant's
dominant share is max over resources r of u_r / C_r; with weights it is divided by the tenant's weight, and whoever has
the least is served first.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .correlate import device_bytes
from .model import TenantId
from .policy import Policy
from .snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Share:
    """What one tenant uses. `weighted` is dominant / weight: equal among tenants where things are fair."""

    tenant: TenantId
    weight: float
    memory_bytes: int
    kv_device_bytes: int
    kv_host_bytes: int
    dominant: float
    """0..1 and above: the largest of its shares of RAM and of device KV."""
    resource: str
    """Which one that is: "memory" or "kv"."""

    @property
    def weighted(self) -> float:
        return self.dominant / self.weight


def shares(snapshot: Snapshot, policy: Policy) -> dict[TenantId, Share]:
    """Each tenant's share, tenants without use included.

    RAM is what tool calls use and what KV occupies in the host tier, out of the tool pool: the two compete for it.
    """
    tools: dict[TenantId, int] = defaultdict(int)
    device: dict[TenantId, int] = defaultdict(int)
    host: dict[TenantId, int] = defaultdict(int)
    for call in snapshot.tool_calls:
        if call.gone_ns is None:
            tools[call.tenant] += call.used_bytes
    for session in snapshot.sessions:
        engine = snapshot.engine(session.engine)
        if engine is not None:
            device[session.tenant] += device_bytes(session, engine)
            host[session.tenant] += session.host_bytes
    pool = policy.memory.pool_bytes(snapshot.host.memory_total_bytes)
    capacity = sum(e.device_capacity_tokens * e.bytes_per_token for e in snapshot.engines if e.attached)
    known = {t.id for t in snapshot.tenants} | {c.tenant for c in snapshot.tool_calls} | device.keys() | host.keys()
    result = {}
    for tenant in sorted(known):
        memory_share = (tools[tenant] + host[tenant]) / pool if pool else 0.0
        kv_share = device[tenant] / capacity if capacity else 0.0
        result[tenant] = Share(
            tenant=tenant,
            weight=snapshot.weight(tenant),
            memory_bytes=tools[tenant],
            kv_device_bytes=device[tenant],
            kv_host_bytes=host[tenant],
            dominant=max(memory_share, kv_share),
            resource="memory" if memory_share >= kv_share else "kv",
        )
    return result


def serve_order(shares_by_tenant: dict[TenantId, Share]) -> list[TenantId]:
    """Least weighted dominant share first; ties by name, so that the order never depends on chance."""
    return sorted(shares_by_tenant, key=lambda t: (shares_by_tenant[t].weighted, t))


def gap(shares_by_tenant: dict[TenantId, Share]) -> float:
    """Spread of the weighted dominant shares among tenants that use anything; 0 is perfectly fair."""
    used = [share.weighted for share in shares_by_tenant.values() if share.dominant > 0]
    return max(used) - min(used) if len(used) > 1 else 0.0
