"""A step of the ladder: what it wants to do to one call, and the words for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..actions import Action, Candidate
from ..fairness import Share
from ..model import MIB, Sandbox, TenantId, ToolCall


@dataclass(frozen=True, slots=True)
class Step:
    """What the ladder wants to do to one call, and why; decide() makes a Decision of it."""

    call: ToolCall
    action: Action
    rule: str
    measurement: float
    threshold: float
    unit: str
    evidence: str
    candidates: tuple[Candidate, ...] = ()
    trigger_ns: int | None = None


def pays_first(call: ToolCall, by_tenant: Mapping[TenantId, Share]) -> tuple[float, int, int]:
    """A sort key: the tenant furthest above its share, and of that its largest call."""
    return (-by_tenant[call.tenant].weighted, -call.used_bytes, call.id)


def subject(call: ToolCall, sandboxes: tuple[Sandbox, ...]) -> str:
    """The call for people: "gold/ada pytest"."""
    label = next((s.label for s in sandboxes if s.cgroup_id == call.sandbox), str(call.tenant))
    return f"{label} {call.kind}"


def mib(amount: int) -> str:
    return f"{amount / MIB:.0f} MiB"
