"""A snapshot as points of the timeline: memory by sandbox, KV by tenant and tier."""

from __future__ import annotations

from collections import defaultdict

from ...policies.correlate import device_bytes
from ...policies.model import KvTier, TenantId
from ...policies.snapshot import Snapshot
from .journal import Sample, Series


def samples_of(snapshot: Snapshot) -> list[Sample]:
    """One point a sandbox, and one a tenant and tier that holds something."""
    at_ns = snapshot.now_ns
    points = [Sample(at_ns, Series.SANDBOX_MEMORY, s.tenant, s.label, s.memory_bytes) for s in snapshot.sandboxes]
    held: dict[tuple[TenantId, str], int] = defaultdict(int)
    for session in snapshot.sessions:
        engine = snapshot.engine(session.engine)
        if engine is not None:
            held[session.tenant, KvTier.DEVICE.value] += device_bytes(session, engine)
            held[session.tenant, KvTier.HOST.value] += session.host_bytes
            held[session.tenant, KvTier.DISK.value] += session.disk_bytes
    points += [Sample(at_ns, Series.KV, tenant, tier, value) for (tenant, tier), value in held.items() if value]
    return points
