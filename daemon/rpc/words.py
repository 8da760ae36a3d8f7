"""Actions in words, as they are printed, shown and told to agents. One wording for every place that shows one."""

from __future__ import annotations

from typing import assert_never

from ...policies.actions import (
    Action,
    Decision,
    Drop,
    Hold,
    Outcome,
    OutcomeStatus,
    Release,
    Retain,
    SetHostTierCapacity,
    SetTenantWeight,
    SwapIn,
    SwapOut,
    ToolCallAction,
)
from ...policies.model import MIB, NS_PER_S, ToolCallId


def of_action(action: Action) -> str:
    """What is done, without its subject: "grant 640 MiB"."""
    if isinstance(action, ToolCallAction):
        return action.words
    match action:
        case SwapOut(tier=tier):
            return f"swap KV out to {tier.value}"
        case SwapIn():
            return "swap KV in"
        case Retain(ttl_ns=ttl_ns):
            return f"keep KV for {ttl_ns / NS_PER_S:g} s"
        case Drop():
            return "drop KV"
        case Hold(ttl_ns=ttl_ns):
            return f"hold the next turn for {ttl_ns / NS_PER_S:g} s"
        case Release():
            return "let the next turn go on"
        case SetTenantWeight(weight=weight):
            return f"set weight {weight:g}"
        case SetHostTierCapacity(host_bytes=host_bytes):
            return f"set KV host tier to {host_bytes / MIB:.0f} MiB"
        case _:
            assert_never(action)


def of_decision(decision: Decision, outcome: Outcome | None) -> str:
    """One line for a table: "swap KV out to host: completed in 12 ms"."""
    text = of_action(decision.action)
    if outcome is None:
        return text
    if outcome.status is OutcomeStatus.COMPLETED:
        latency = f" in {outcome.latency_ns / 1e6:.0f} ms" if outcome.latency_ns is not None else ""
        return f"{text}: done{latency}"
    return f"{text}: {outcome.status.value}" + (f" ({outcome.detail})" if outcome.detail else "")


def tool_call_hex(tool_call: ToolCallId) -> str:
    """16 hex digits: how a tool call's id is printed everywhere."""
    return f"{tool_call:016x}"
