"""A policy as the document that says the same, with every default written out; and what differs between two.

Owns the way back from values to words; table.py owns the way in. A test holds one against the other.
"""

from __future__ import annotations

from typing import Any

from ..model import KvTier
from ..policy import Budget, CallClass, KvPolicy, MemoryPolicy, Policy
from .quantities import written_bytes, written_ns, written_ratio
from .rules import written_rule
from .table import API_VERSION


def written(policy: Policy) -> dict[str, Any]:
    """The whole document: plain mappings, lists, text and numbers."""
    budgets = dict(policy.tenant_budgets)
    tenants = {str(tenant.id): {"weight": tenant.weight} | _own(budgets.get(tenant.id)) for tenant in policy.tenants}
    return {
        "apiVersion": API_VERSION,
        "kind": "Policy",
        "metadata": {"name": policy.name},
        "spec": {
            "mode": policy.mode.value,
            "tenants": tenants,
            "toolCalls": {each.name: _class(each) for each in policy.classes},
            "memory": _memory(policy.memory),
            "kv": _kv(policy.kv),
            "roles": [{"match": rule.match, "role": rule.role.value} for rule in policy.roles],
        },
    }


def changes(before: Policy, after: Policy) -> list[str]:
    """What differs, one line a place: "spec.memory.maxWait: 20s -> 10s"."""
    old, new = dict(_leaves(written(before))), dict(_leaves(written(after)))
    lines = []
    for place in [*old, *(place for place in new if place not in old)]:
        if place not in new:
            lines.append(f"{place}: {old[place]} is gone")
        elif place not in old:
            lines.append(f"{place}: {new[place]} is new")
        elif old[place] != new[place]:
            lines.append(f"{place}: {old[place]} -> {new[place]}")
    return lines


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, of in value.items() for leaf in _leaves(of, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for number, of in enumerate(value) for leaf in _leaves(of, f"{path}[{number}]")]
    return [(path, value)]


def _budget(budget: Budget) -> dict[str, str]:
    return {"soft": written_bytes(budget.soft_bytes), "hard": written_bytes(budget.hard_bytes)}


def _own(budget: Budget | None) -> dict[str, Any]:
    return {"budget": _budget(budget)} if budget is not None else {}


def _class(of: CallClass) -> dict[str, Any]:
    source = of.source.value if of.source is not None else None
    match = {"command": of.command, "tool": of.tool, "source": source, "tenant": of.tenant}
    wait = {"maxWait": written_ns(of.wait_ns)} if of.wait_ns is not None else {}
    return {"match": {key: value for key, value in match.items() if value is not None}} | _own(of.budget) | wait


def _memory(memory: MemoryPolicy) -> dict[str, Any]:
    amount = memory.tool_pool_bytes
    return {
        "toolPool": written_bytes(amount) if amount is not None else written_ratio(memory.tool_pool_ratio),
        "budget": _budget(memory.budget)
        | {"max": written_bytes(memory.max_bytes), "step": written_bytes(memory.step_bytes), "bends": memory.bends},
        "budgets": {kind: _budget(budget) for kind, budget in memory.kind_budgets},
        "maxWait": written_ns(memory.wait_ns),
        "ladder": [written_rule(rule) for rule in memory.ladder],
    }


def _kv(kv: KvPolicy) -> dict[str, Any]:
    return {
        "decideAfter": written_ns(kv.decide_after_ns),
        "dwell": written_ns(kv.dwell_ns),
        "hysteresis": written_ratio(kv.hysteresis_ratio),
        "retain": written_ns(kv.retain_ns),
        "deadline": written_ns(kv.directive_ns),
        "tiers": [tier.value for tier in (KvTier.HOST, KvTier.DISK) if tier in kv.tiers],
        "door": written_ratio(kv.door_ratio or 0.0),
        "doorLongest": written_ns(kv.door_longest_ns),
    }
