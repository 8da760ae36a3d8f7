"""The one loop: events in, state forward, decisions out, outcomes back in as events.

Owns State and the order of things. Sources only `emit`; the loop wakes, takes in all that waits, asks the policy once,
has each decision carried out and takes in what came of it. Cool-down after a failure and the mode of a policy (observe,
dry-run, enforce) live here, once, and in no decision.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from ..policies.actions import Action, Decision, Outcome, OutcomeStatus
from ..policies.decide import decide
from ..policies.events import DecisionMade, Event, OutcomeObserved
from ..policies.model import NS_PER_S, ToolCall
from ..policies.policy import Mode, Policy
from ..policies.snapshot import Snapshot
from ..policies.state import State
from . import log
from .rehearsal import TIER, Rehearsal

COOL_DOWN_NS = NS_PER_S
"""After a failure or a refusal, the same action on the same subject is not tried again for this long."""
QUEUE_LENGTH = 100_000
"""Events that may wait; beyond it the oldest are counted as lost rather than memory growing without bound."""

Act = Callable[[Decision], Outcome | None]
"""Carry a decision out. None: the outcome will come as an event."""
Sink = Callable[[Event, State], None]
"""Sees every event after the state has taken it in: the journal, the metrics, the cgroup keeper."""

_COOLING = (OutcomeStatus.FAILED, OutcomeStatus.REJECTED)


def tick(state: State, events: Sequence[Event], now_ns: int, policy: Policy) -> tuple[Snapshot, tuple[Decision, ...]]:
    """One turn without its effects: apply the events, look, decide. For replays and tests."""
    for event in events:
        state.apply(event)
    snapshot = state.snapshot(now_ns)
    return snapshot, decide(snapshot, policy)


class Loop:
    """Drives State. Everything here runs on one asyncio loop; `emit` alone may be called from callbacks of it."""

    def __init__(
        self, state: State, act: Act, sinks: Sequence[Sink], now_ns: Callable[[], int], tick_s: float = 0.1
    ) -> None:
        """`sinks` may still grow until the first turn."""
        self.state = state
        self.snapshot = state.snapshot(now_ns())
        """As of the last turn."""
        self.dropped_count = 0
        """Events thrown away because the queue was full."""
        self.turn_count = 0
        self._act = act
        self._sinks = sinks
        self._now_ns = now_ns
        self._tick_s = tick_s
        self._queue: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._cooling: dict[tuple[type[Action], str], int] = {}
        self._turn_hooks: list[Callable[[Snapshot], None]] = []
        self._stopping = False
        self._rehearsal: Rehearsal | None = None
        """While the policy is a dry run."""

    def emit(self, event: Event) -> None:
        """Take in an event at the next turn, which begins at once."""
        if len(self._queue) >= QUEUE_LENGTH:
            self._queue.popleft()
            self.dropped_count += 1
        self._queue.append(event)
        self._wake.set()

    def every_turn(self, hook: Callable[[Snapshot], None]) -> None:
        """Call `hook` with the snapshot at the end of each turn, at least once in `tick_s`."""
        self._turn_hooks.append(hook)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Turn until stop(); a turn that fails is logged and counted, and the loop lives on."""
        while not self._stopping:
            try:
                # Not wait_for(): before Python 3.12 it loses a cancellation that comes together with an event.
                async with asyncio.timeout(self._tick_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # nothing happened: time passing is reason enough to look
            self._wake.clear()
            try:
                self.turn()
            except Exception as error:
                log.warning("turn_failed", error=repr(error))
                await asyncio.sleep(self._tick_s)

    def turn(self) -> Snapshot:
        """Take in what waits, decide, act, look again."""
        self._take_in()
        now_ns = self._now_ns()
        self.snapshot = self.state.snapshot(now_ns)
        self._rehearse()
        for decision in self._decide(now_ns):
            self._carry_out(decision, now_ns)
        if self._queue:
            self._take_in()
            self.snapshot = self.state.snapshot(self._now_ns())
        for hook in self._turn_hooks:
            hook(self.snapshot)
        self.turn_count += 1
        return self.snapshot

    def _take_in(self) -> None:
        while self._queue:
            event = self._queue.popleft()
            self.state.apply(event)
            if self._rehearsal is not None:
                self._rehearsal.take_in(event)
            self._tell(event)

    def _tell(self, event: Event) -> None:
        for sink in self._sinks:
            sink(event, self.state)

    def _rehearse(self) -> None:
        """Begin or end the dry run, as the policy says."""
        dry = self.state.policy.mode is Mode.DRY_RUN
        if dry != (self._rehearsal is not None):
            self._rehearsal = Rehearsal(self.state) if dry else None

    def _decide(self, now_ns: int) -> tuple[Decision, ...]:
        if self.state.policy.mode is Mode.OBSERVE:
            return ()
        seen = self._rehearsal.snapshot(now_ns) if self._rehearsal is not None else self.snapshot
        return decide(seen, self.state.policy)

    def would_be(self, call: ToolCall) -> str:
        """In a dry run: what a call would be, where that is something else than it is; else empty."""
        return self._rehearsal.would_be(call) if self._rehearsal is not None else ""

    def _carry_out(self, decision: Decision, now_ns: int) -> None:
        key = (type(decision.action), decision.subject)
        if self._cooling.get(key, 0) > now_ns:
            return
        if self._rehearsal is not None:
            outcome: Outcome | None = self._only_say(decision, self._rehearsal, now_ns)
        else:
            self._queue.append(DecisionMade(decision.at_ns, decision))
            self._take_in()  # the journal holds the decision before anything is done
            outcome = self._act(decision)
            if outcome is not None:
                self._queue.append(OutcomeObserved(outcome.at_ns, outcome))
        log.event(
            "decision",
            rule=decision.rule,
            subject=decision.subject,
            action=type(decision.action).__name__,
            measurement=round(decision.measurement, 3),
            threshold=round(decision.threshold, 3),
            unit=decision.unit,
            outcome=outcome.status.value if outcome else "sent",
            runners_up=",".join(f"{c.name}={c.cost:.3g}" for c in decision.candidates[1:]),
        )
        if outcome is not None and outcome.status in _COOLING:
            self._cooling[key] = now_ns + COOL_DOWN_NS
        for old in [k for k, until_ns in self._cooling.items() if until_ns <= now_ns]:
            del self._cooling[old]

    def _only_say(self, decision: Decision, rehearsal: Rehearsal, now_ns: int) -> Outcome:
        """A dry run: who writes down decisions is told; what is known of the host does not change."""
        made = DecisionMade(decision.at_ns, decision)
        outcome = Outcome(decision.id, OutcomeStatus.DRY_RUN, now_ns, TIER, "the policy's mode is dry-run")
        rehearsal.state.apply(made)
        rehearsal.carry_out(decision, now_ns)
        self._tell(made)
        self._tell(OutcomeObserved(now_ns, outcome))
        return outcome
