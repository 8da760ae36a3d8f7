"""What is held back follows what happens: a call's leaf, its merging, its end; a sandbox's arming; budgets polled for.

A sink of the loop, after the keepers: a call's leaf is there by then. Decides nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ...policies.actions import Outcome, OutcomeStatus
from ...policies.events import (
    BudgetChanged,
    BudgetReached,
    Event,
    OutcomeObserved,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallMerged,
    ToolCallStarted,
    ToolCallWithdrawn,
)
from ...policies.model import CgroupId, ToolCall, ToolCallId
from ...policies.state import State
from ..observe.journal import HoldCause, HoldKind
from .actuator import Actuator
from .fallback_budget import FallbackBudget
from .holds import Holds


class Following:
    """`leaf(call)` is its cgroup, `disarm(sandbox)` takes hard budgets away where a stop could not be written down."""

    def __init__(
        self,
        actuator: Actuator,
        polling: FallbackBudget | None,
        *,
        leaf: Callable[[ToolCallId], str | None],
        disarm: Callable[[CgroupId], None],
        own_cgroups: bool,
    ) -> None:
        self._actuator = actuator
        self._polling = polling
        self._leaf = leaf
        self._disarm = disarm
        self._own_cgroups = own_cgroups

    def __call__(self, event: Event, state: State) -> None:
        match event:
            case SandboxRegistered(sandbox=registered) if self._own_cgroups:
                if not self._actuator.arm(registered.path):
                    self._disarm(registered.cgroup_id)
            case SandboxRemoved(path=path):
                self._actuator.disarm(path)
            case ToolCallMerged():
                self._actuator.merge(event.id, event.into)
            case BudgetReached():
                self._actuator.stopped_at_budget(event)
            case BudgetChanged() if self._polling is not None:
                with contextlib.suppress(LookupError):  # it has ended meanwhile
                    self._polling.set_budget(event.id, soft_bytes=event.soft_bytes, hard_bytes=event.hard_bytes)
            case ToolCallStarted(id=tool_call) if call := state.tool_calls.get(tool_call):
                self._bind(call, state)
            case ToolCallWithdrawn(id=tool_call):
                self._actuator.unbind(tool_call)
            case ProcessesGone(id=tool_call) if state.resolve(tool_call) == tool_call:
                self._actuator.unbind(tool_call)
                if self._polling is not None:
                    self._polling.unfollow(tool_call)
            case _:
                pass

    def _bind(self, call: ToolCall, state: State) -> None:
        sandbox = state.sandboxes.get(call.sandbox)
        leaf = self._leaf(call.id)
        self._actuator.bind(
            call.id,
            leaf=leaf,
            pid=call.pid,
            agent_pid=sandbox.agent_pid if sandbox else None,
            hard_bytes=call.hard_bytes,
        )
        if self._polling is not None and call.pid is not None:
            self._polling.follow(
                call.id, leaf=leaf, pid=call.pid, soft_bytes=call.soft_bytes, hard_bytes=call.hard_bytes
            )


def release_on_request(
    holds: Holds, actuator: Actuator, emit: Callable[[Event], None], now_ns: Callable[[], int]
) -> list[str]:
    """Undo everything that is held back, while the daemon goes on; answers what was undone, in words."""
    held = [hold for hold in holds.all() if hold.kind != HoldKind.ARMED]
    failed = actuator.release_all()
    at_ns = now_ns()
    for hold in held:
        if hold.cause == HoldCause.BUDGET and hold.tool_call is not None:
            emit(BudgetChanged(at_ns, hold.tool_call, 0, 0))
        elif hold.decision is not None:
            outcome = Outcome(hold.decision, OutcomeStatus.EXPIRED, at_ns, hold.kind.value, "released on request")
            emit(OutcomeObserved(at_ns, outcome))
    return [f"{hold.kind.value} on {hold.target}" for hold in held] + (
        [f"{failed} of them could not be undone: see the log"] if failed else []
    )
