"""What the demo keeps of the daemon's Watch stream: one small sample per answer, for the report and the timeline.

Owns the reduction of a WatchResponse to figures over time. Must not: keep the answers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..api.v1.policy_pb2 import WatchResponse


@dataclass(frozen=True, slots=True)
class SandboxSample:
    cgroup_id: int
    tenant: str
    name: str
    memory_bytes: int

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class TenantSample:
    tenant: str
    weight: float
    dominant_share: float
    """Weighted dominant share over RAM and KV."""
    dominant_resource: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine at one instant of CLOCK_MONOTONIC."""

    at_ns: int
    sandboxes: tuple[SandboxSample, ...]
    tenants: tuple[TenantSample, ...]
    tool_used_bytes: int
    tool_pool_bytes: int
    device_capacity_bytes: int
    """KV capacity of all engines; 0 before one attached."""


def sample_of(response: WatchResponse) -> Sample:
    return Sample(
        at_ns=response.now_ns,
        sandboxes=tuple(SandboxSample(s.cgroup_id, s.tenant_id, s.name, s.memory_bytes) for s in response.sandboxes),
        tenants=tuple(
            TenantSample(
                t.tenant_id, t.weight, t.dominant_share, t.dominant_resource, t.kv_device_bytes, t.kv_host_bytes
            )
            for t in response.tenants
        ),
        tool_used_bytes=response.host.tool_used_bytes,
        tool_pool_bytes=response.host.tool_pool_bytes,
        device_capacity_bytes=sum(e.device_capacity_tokens * e.bytes_per_token for e in response.engines if e.attached),
    )
