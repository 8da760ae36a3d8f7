"""The daemon in a world: State and decide() as they are, told what a host would tell them, and obeyed.

Owns the daemon's side: events in, the picture, decisions, their outcomes as events again. A directive reaches the
engine at its next step border; what is done to a tool call, at once. Decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, assert_never

from ..actions import (
    Action,
    Decision,
    Drop,
    EngineAction,
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
from ..decide import decide
from ..events import BudgetReached, DecisionMade, Event, OutcomeObserved, ToolCallMemoryStepped
from ..model import NS_PER_S, KvTier
from ..policy import Policy
from ..snapshot import Snapshot
from ..state import State
from .seat import Stage

if TYPE_CHECKING:
    from .world import World

TICK_S = 0.5
LONGEST_TICK, QUIET_TICKS = 4.0, 2
"""The pause between two looks grows after so many quiet ones, up to so many ticks."""
Decide = Callable[[Snapshot, Policy], tuple[Decision, ...]]


def decide_on_tools(snapshot: Snapshot, policy: Policy) -> tuple[Decision, ...]:
    """decide() without what concerns KV: the ladder alone."""
    return tuple(d for d in decide(snapshot, policy) if isinstance(d.action, ToolCallAction))


class Daemon:
    """`log` holds every decision with its outcome's status, in the order in which the outcomes came."""

    def __init__(self, policy: Policy, decide: Decide = decide, tick_s: float = TICK_S) -> None:
        self.policy = policy
        self.state = State(policy)
        self.log: list[tuple[Decision, OutcomeStatus]] = []
        self._decide = decide
        self._tick_s = tick_s
        self._events: list[Event] = []
        self._next_s = self._last_s = 0.0
        self._quiet = 0
        self._due: list[tuple[float, Decision]] = []

    def hear(self, event: Event) -> None:
        """Taken in at the next turn, at most a tick later; a call that stands at its budget brings it about at once.

        Memory that moves below every budget can wait for the turn that comes anyway.
        """
        self._events.append(event)
        if isinstance(event, BudgetReached):
            self._next_s = 0.0
        elif not isinstance(event, ToolCallMemoryStepped):
            self._next_s, self._quiet = min(self._next_s, self._last_s + self._tick_s), 0

    def next_s(self) -> float:
        return min(self._next_s, self._due[0][0] if self._due else inf)

    def turn(self, world: World) -> None:
        """Hand over what is due; once a tick, look and decide."""
        while self._due and self._due[0][0] <= world.now_s:
            self._done(self._due[0][1], self._obey(self._due.pop(0)[1], world), world)
        if self._next_s > world.now_s:
            return
        self._last_s = world.now_s
        world.observe()
        self.take_in()
        for decision in self._decide(self.state.snapshot(_ns(world.now_s)), self.policy):
            self.state.apply(DecisionMade(_ns(world.now_s), decision))
            if isinstance(decision.action, ToolCallAction):
                self._done(decision, world.tools.act(decision.action, decision.id, world.now_s), world)
            else:
                self._due.append((world.engine.compute.border_s(), decision))
        self._due.sort(key=lambda due: due[0])
        self._next_s = self._last_s + self._pause_s(world)

    def _pause_s(self, world: World) -> float:
        """Until the next look, were nothing to happen: longer and longer while nothing does, since all that changes
        then is how long calls have run; without a call there is nothing to decide at all."""
        self._quiet += 1
        if not world.tools.calls:
            return inf
        if any(call.held_back for call in world.tools.calls.values()):
            return self._tick_s
        return self._tick_s * max(1.0, min(LONGEST_TICK, self._quiet / QUIET_TICKS))

    def take_in(self) -> None:
        for event in self._events:
            self.state.apply(event)
        self._events.clear()

    def _done(self, decision: Decision, status: OutcomeStatus, world: World) -> None:
        self.log.append((decision, status))
        now_ns = _ns(world.now_s)
        self.state.apply(OutcomeObserved(now_ns, Outcome(decision.id, status, now_ns, "world")))

    def _obey(self, decision: Decision, world: World) -> OutcomeStatus:
        action = decision.action
        if not isinstance(action, EngineAction):
            raise TypeError(f"{action}: not for the engine")
        if action.expires_ns <= _ns(world.now_s):
            return OutcomeStatus.EXPIRED
        return carry_out(action, world)


def carry_out(action: EngineAction, world: World) -> OutcomeStatus:
    """A directive in the engine, at a step border. One on a session whose turn has been asked for comes too late."""
    match action:
        case SetTenantWeight():
            return OutcomeStatus.COMPLETED
        case SetHostTierCapacity(host_bytes=host_bytes):
            world.host_limit_bytes = host_bytes
            world.engine.squeeze()
            return OutcomeStatus.COMPLETED
        case Hold(session=session, ttl_ns=ttl_ns):
            held = world.engine.hold(world.engine.seat_of[session], world.now_s + ttl_ns / NS_PER_S)
            return OutcomeStatus.COMPLETED if held else OutcomeStatus.REJECTED
        case Release(session=session):
            world.engine.release(world.engine.seat_of[session])
            return OutcomeStatus.COMPLETED
        case SwapOut() | SwapIn() | Retain() | Drop():
            return _move(action, world)
        case _:
            assert_never(action)


def _move(action: SwapOut | SwapIn | Retain | Drop, world: World) -> OutcomeStatus:
    engine = world.engine
    seat = engine.seat_of[action.session]
    if seat.stage is not Stage.IDLE or seat.tier is KvTier.NONE:
        return OutcomeStatus.REJECTED
    tiers = engine.tiers
    match action:
        case SwapOut(tier=tier):
            fits = tiers.host_fits(seat, engine.seats) if tier is KvTier.HOST else tiers.disk_room(seat, engine.seats)
            if not fits or seat.tier is tier or (tier is KvTier.HOST and seat.tier is KvTier.DISK):
                return OutcomeStatus.REJECTED
            tiers.move(seat, tier, world.now_s)
        case SwapIn():
            if seat.tier is KvTier.DEVICE or tiers.free_tokens < seat.held_tokens:
                return OutcomeStatus.REJECTED
            tiers.load(seat, 0, world.now_s)
        case Drop():
            tiers.move(seat, KvTier.NONE, world.now_s)
        case Retain(ttl_ns=ttl_ns):
            seat.retain_until_s = world.now_s + ttl_ns / NS_PER_S
    engine.serve()
    return OutcomeStatus.COMPLETED


def actions_of(log: list[tuple[Decision, OutcomeStatus]], kind: type[Action]) -> list[Decision]:
    return [decision for decision, _ in log if isinstance(decision.action, kind)]


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
