"""The face of enforce/ to the daemon: decisions in, outcomes out, by way of the rungs.

Owns what an outcome is called, and when holds end: at their expiry, with their tool call, at a release. Decides
nothing, and knows no action by itself (rungs.py does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...policies.actions import Decision, Outcome, OutcomeStatus, ToolCallAction
from ...policies.events import BudgetReached
from ...policies.model import NS_PER_S, DecisionId, ToolCallId
from .. import log
from ..errors import JournalError
from ..observe.journal import HoldCause, HoldKind
from ..sandboxes.cgroups import Applied, CgroupDriver, Effect
from ..sandboxes.processes import PROC
from . import rungs, stop
from .holds import Holds
from .rung import LONGEST_HOLD_NS, NO_TIER, Means
from .targets import Budgets, Targets

_RETRY_NS = NS_PER_S

_STATUS = {
    Effect.DONE: OutcomeStatus.COMPLETED,
    Effect.PARTIAL: OutcomeStatus.CLIPPED,
    Effect.GONE: OutcomeStatus.GONE,
    Effect.UNAVAILABLE: OutcomeStatus.REJECTED,
    Effect.FAILED: OutcomeStatus.FAILED,
}


class Actuator:
    """Executes tool-call actions. One thread; no method raises for what the kernel or the journal says."""

    def __init__(
        self,
        holds: Holds,
        driver: CgroupDriver | None,
        budgets: Budgets | None,
        *,
        budget_tier: str = "kernel budget",
        now_ns: Callable[[], int] = time.monotonic_ns,
        proc_root: Path = PROC,
    ) -> None:
        self.failed_count = 0
        self._holds = holds
        self._now_ns = now_ns
        self._targets = Targets(driver, budgets, proc_root)
        self._means = Means(holds, self._targets, driver, budgets, budget_tier, now_ns, proc_root)
        self._retry_ns: dict[int, int] = {}

    # -- what there is to act on

    def bind(
        self,
        tool_call: ToolCallId,
        *,
        leaf: str | None = None,
        pid: int | None = None,
        agent_pid: int | None = None,
        hard_bytes: int | None = None,
    ) -> None:
        """Say where a tool call is; called again, it adds what was not known. Before the first action on it."""
        self._targets.bind(tool_call, leaf=leaf, pid=pid, agent_pid=agent_pid, hard_bytes=hard_bytes)

    def merge(self, tool_call: ToolCallId, into: ToolCallId) -> None:
        """Both ids mean `into` from now on; its leaf and root process come along where `into` has none."""
        self._targets.merge(tool_call, into)

    def unbind(self, tool_call: ToolCallId) -> None:
        """Forget a tool call whose processes are gone; whatever still holds it is undone."""
        self._holds.undo(self._means.of(self._targets.find(tool_call)))
        self._targets.unbind(tool_call)

    def arm(self, sandbox: str) -> bool:
        """Before budgets are set in a sandbox: write down that the kernel may stop its processes. Idempotent.

        False: the journal refused, so set no hard budget there.
        """
        try:
            stop.arm(self._means, sandbox)
        except JournalError as error:
            self._failed("arm", error)
            return False
        return True

    def disarm(self, sandbox: str) -> None:
        """When the sandbox goes: continue what is still stopped in it, and strike it out."""
        self._holds.undo(stop.armed(self._means, sandbox))

    def stopped_at_budget(self, event: BudgetReached) -> None:
        """Note that the kernel stopped a process, so that it goes on in the end even if nobody decides."""
        try:
            stop.note(self._means, event)
        except JournalError as error:
            self._failed("stopped_at_budget", error)

    # -- acting

    def execute(self, decision: Decision) -> Outcome:
        """Carry out a decision about a tool call. Raises TypeError for one about an engine."""
        action = decision.action
        if not isinstance(action, ToolCallAction):
            raise TypeError(f"{type(action).__name__} is for an engine")
        target = self._targets.find(action.tool_call)
        expires_ns = getattr(action, "expires_ns", None)
        if expires_ns is not None and expires_ns <= self._now_ns():
            return self._outcome(decision, OutcomeStatus.EXPIRED, NO_TIER, "its expiry had passed before it was done")
        try:
            result = rungs.do(self._means, target, decision.id, action)
        except JournalError as error:
            result = Applied(Effect.FAILED, "journal", f"not done, since it could not be written down: {error}")
        status = _STATUS[result.effect]
        if status is OutcomeStatus.FAILED:
            self._failed(type(action).__name__, result.detail)
        elif status is OutcomeStatus.COMPLETED and expires_ns is not None and self._means.cap(expires_ns) != expires_ns:
            status = OutcomeStatus.CLIPPED
            result = replace(result, detail=f"held for at most {LONGEST_HOLD_NS / NS_PER_S:g} s")
        return self._outcome(decision, status, result.tier, result.detail)

    def expire(self, now_ns: int) -> tuple[Outcome, ...]:
        """Undo what is due. One Outcome (EXPIRED) a decision; a failed undo is tried again a second later.

        Call it after the policy has decided: at the end of a wait its verdict goes first.
        """
        due = [h for h in self._holds.due(now_ns) if self._retry_ns.get(h.id or 0, 0) <= now_ns]
        if not due:
            return ()
        tiers: dict[DecisionId, str] = {}
        for call in {h.tool_call for h in due if h.cause == HoldCause.BUDGET and h.tool_call is not None}:
            stop.go_on(self._means, self._targets.find(call))
        for hold, result in self._holds.undo(due):
            if result.effect is Effect.FAILED:
                self._retry_ns[hold.id or 0] = now_ns + _RETRY_NS
                self._failed("expire", result.detail)
                continue
            self._retry_ns.pop(hold.id or 0, None)
            log.event("hold_expired", kind=hold.kind, cause=hold.cause, target=hold.target)
            if hold.decision is not None:
                tiers.setdefault(hold.decision, result.tier or hold.kind.value)
        return tuple(
            Outcome(decision, OutcomeStatus.EXPIRED, now_ns, tier, "undone at its expiry")
            for decision, tier in tiers.items()
        )

    def release_all(self, *, ending: bool = False) -> int:
        """Undo every hold; answers how many could not be.

        While the daemon goes on, sandboxes stay armed in the journal, since the kernel may stop their calls again.
        """
        for target in self._targets.all():
            if self._means.of(target, HoldCause.BUDGET):
                stop.go_on(self._means, target, lift=True)
        armed = tuple(h for h in self._holds.all() if h.kind == HoldKind.ARMED)
        undone = self._holds.undo(h for h in self._holds.all() if ending or h.kind != HoldKind.ARMED)
        failed = sum(1 for _, result in undone if result.effect is Effect.FAILED)
        if not ending:
            for hold in armed:
                failed += rungs.undo(hold, self._means.driver, self._means.proc_root).effect is Effect.FAILED
        return failed

    # -- inside

    def _outcome(self, decision: Decision, status: OutcomeStatus, tier: str, detail: str) -> Outcome:
        now_ns = self._now_ns()
        since_ns = decision.trigger_ns if decision.trigger_ns is not None else decision.at_ns
        return Outcome(decision.id, status, now_ns, tier, detail, max(0, now_ns - since_ns))

    def _failed(self, what: str, detail: str | JournalError) -> None:
        self.failed_count += 1
        log.warning("action_failed", action=what, detail=str(detail))
