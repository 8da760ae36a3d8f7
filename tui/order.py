"""The orders in which tool calls can be listed. Owns the sort keys; running calls always come before ended ones."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ..daemon.api.v1.policy_pb2 import ToolCallView


class Order(Enum):
    NEWEST = "newest"
    MEMORY = "memory"
    KV = "KV held"
    TENANT = "tenant"

    def next(self) -> Order:
        orders = list(Order)
        return orders[(orders.index(self) + 1) % len(orders)]


def ordered(calls: Iterable[ToolCallView], order: Order) -> list[ToolCallView]:
    """A total order: two calls never change places from one answer to the next without a reason."""

    def key(call: ToolCallView) -> tuple[object, ...]:
        match order:
            case Order.NEWEST:
                first: tuple[object, ...] = ()
            case Order.MEMORY:
                first = (-(call.peak_bytes if call.end_ns else call.used_bytes),)
            case Order.KV:
                first = (-call.kv_held_bytes,)
            case Order.TENANT:
                first = (call.tenant_id, call.sandbox)
        return (bool(call.end_ns), *first, -call.start_ns, call.tool_call_id)

    return sorted(calls, key=key)
