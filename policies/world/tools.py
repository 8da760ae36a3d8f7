"""The tool calls of a world: their memory follows their scripts until somebody holds them back.

Owns how a call advances and what happens where host RAM runs short. Three ways, by `Keeping`: the ladder's (the kernel
stops a call at its budget and the policy answers), standing (an ideal pool: the newest call stands until there is room
again, the oldest always goes on), and nobody's (the largest call is killed when the host is full).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import inf

from ..actions import Grant, Kill, Outcome, OutcomeStatus, Thaw, Throttle, ToolCallAction, Wait
from ..events import BudgetLevel, BudgetReached, Event, OutcomeObserved, ToolCallMemoryStepped
from ..model import NS_PER_S, DecisionId, ToolCallId
from .score import Tally
from .script import Tool

THROTTLED_SPEED = 0.2
OVERSHOOT_BYTES = 64 * 1024
"""By which a call stands above its budget when the kernel has stopped it: a page or two for each of its threads."""
SMALL_BYTES = 150_000_000
"""Making a call stand that holds less than this relieves nobody."""
_SLACK = 1e-9


class Keeping(Enum):
    LADDER = "ladder"
    STAND = "stand"
    NOBODY = "nobody"


@dataclass(slots=True)
class Call:
    """A tool call that has processes."""

    id: ToolCallId
    tool: Tool
    agent: int
    soft_bytes: int
    hard_bytes: int
    started_s: float
    at_s: float
    """Up to when `worked_s` and the times below are right."""
    worked_s: float = 0.0
    speed: float = 1.0
    used_bytes: int = 0
    stopped_s: float | None = None
    throttle: tuple[DecisionId, int] | None = None
    """Who slowed it down, until when (ns)."""
    killed: bool = False
    lost_s: float = 0.0
    """Seconds in which it stood."""
    slowed_s: float = 0.0
    step: int = 0
    """Index of the next step of its memory."""

    @property
    def held_back(self) -> bool:
        return self.stopped_s is not None or self.throttle is not None

    def next_s(self) -> float:
        if self.killed:
            return self.at_s
        if self.throttle is not None and self.speed:
            expires_s = self.throttle[1] / NS_PER_S
            return min(expires_s, self._reached_s())
        return self._reached_s() if self.speed else inf

    def _reached_s(self) -> float:
        memory = self.tool.memory
        target = memory[self.step][0] if self.step < len(memory) else self.tool.seconds
        return self.at_s + max(0.0, min(target, self.tool.seconds) - self.worked_s) / self.speed

    def work(self, now_s: float) -> None:
        passed = now_s - self.at_s
        self.worked_s += passed * self.speed
        self.lost_s += passed if not self.speed else 0.0
        self.slowed_s += passed if 0.0 < self.speed < 1.0 else 0.0
        self.at_s = now_s


@dataclass(frozen=True, slots=True)
class Stop:
    """One call that stood at its budget, and how it was answered."""

    tool_call: ToolCallId
    at_s: float
    answered_s: float
    granted: bool


class Tools:
    """All running calls, in the order in which they started. `emit` is told what a kernel would tell."""

    def __init__(
        self,
        keeping: Keeping,
        room_bytes: Callable[[], float],
        tally: Tally,
        emit: Callable[[Event], None] | None = None,
    ) -> None:
        """`room_bytes`: what all calls may use together, where nobody or an ideal pool keeps them."""
        self.calls: dict[ToolCallId, Call] = {}
        self.used_bytes = 0
        self.stops: list[Stop] = []
        self._keeping = keeping
        self._room_bytes = room_bytes
        self._tally = tally
        self._emit = emit

    def start(self, call: Call) -> None:
        self.calls[call.id] = call

    def next_s(self) -> float:
        return min((call.next_s() for call in self.calls.values()), default=inf)

    def step(self, now_s: float) -> list[Call]:
        """Everything due now. Answers the calls that are over, each once; `killed` says how."""
        over = []
        for call in [c for c in self.calls.values() if c.next_s() <= now_s + _SLACK]:
            call.work(now_s)
            if call.throttle is not None and call.throttle[1] <= round(now_s * NS_PER_S):
                self._throttle_over(call, now_s)
            if call.killed or (self._follow(call, now_s) and call.worked_s >= call.tool.seconds - _SLACK):
                over.append(call)
        for call in over:
            self._use(call, 0, now_s)
            del self.calls[call.id]
            self._tally.stalled_s += call.lost_s
            self._tally.throttled_s += call.slowed_s
            self._tally.kill_count += call.killed
            self._tally.tool_s.append(now_s - call.started_s)
        self._tally.most_tool_bytes = max(self._tally.most_tool_bytes, self.used_bytes)
        return over

    def _follow(self, call: Call, now_s: float) -> bool:
        """Memory as its script has it by now; False where it was stopped at its budget instead."""
        memory = call.tool.memory
        while call.step < len(memory) and memory[call.step][0] <= call.worked_s + _SLACK:
            wanted = memory[call.step][1]
            if self._keeping is Keeping.LADDER and wanted > call.hard_bytes:
                self._stop(call, now_s)
                return False
            self._use(call, wanted, now_s)
            call.step += 1
        return True

    def _stop(self, call: Call, now_s: float) -> None:
        """As the kernel does it: at the budget and a page or two over."""
        call.stopped_s, call.speed = now_s, 0.0
        self._use(call, call.hard_bytes + OVERSHOOT_BYTES, now_s)
        if self._emit:
            at_ns = round(now_s * NS_PER_S)
            level, pid = BudgetLevel.HARD, int(call.id)
            self._emit(BudgetReached(at_ns, call.id, level, call.hard_bytes, call.used_bytes, pid))

    def _use(self, call: Call, used_bytes: int, now_s: float) -> None:
        if used_bytes == call.used_bytes:
            return
        self.used_bytes += used_bytes - call.used_bytes
        call.used_bytes = used_bytes
        if self._emit:
            self._emit(ToolCallMemoryStepped(round(now_s * NS_PER_S), call.id, used_bytes, used_bytes))

    def keep(self, now_s: float) -> bool:
        """Where the host is short, do what this way of keeping does; True where anything changed."""
        match self._keeping:
            case Keeping.LADDER:
                return False
            case Keeping.STAND:
                return self._stand(now_s)
            case Keeping.NOBODY:
                return self._kill_largest(now_s)

    def _stand(self, now_s: float) -> bool:
        over = self.used_bytes - self._room_bytes()
        changed = False
        for number, call in enumerate(reversed(self.calls.values()), 1):
            oldest = number == len(self.calls)
            if oldest and over > 0 and call.used_bytes > self._room_bytes():
                call.killed = changed = True  # all of the pool would not be enough
            stands = over > 0 and not oldest and call.used_bytes > SMALL_BYTES
            over -= call.used_bytes if stands else 0
            if stands != (call.speed == 0.0):
                call.work(now_s)
                call.speed, changed = (0.0 if stands else 1.0), True
        return changed

    def _kill_largest(self, now_s: float) -> bool:
        alive = [c for c in self.calls.values() if not c.killed]
        over = self.used_bytes - sum(c.used_bytes for c in self.calls.values() if c.killed) - self._room_bytes()
        if over <= 0 or not alive:
            return False
        victim = max(alive, key=lambda c: (c.used_bytes, c.id))
        victim.work(now_s)
        victim.killed = True
        return True

    # -- a policy's actions

    def act(self, action: ToolCallAction, decision: DecisionId, now_s: float) -> OutcomeStatus:
        call = self.calls.get(action.tool_call)
        if call is None:
            return OutcomeStatus.GONE
        call.work(now_s)
        match action:
            case Throttle(expires_ns=expires_ns):
                call.throttle = (decision, expires_ns)
                call.speed = THROTTLED_SPEED if call.speed else 0.0
            case Thaw():
                self._unthrottle(call)
            case Grant(soft_bytes=soft_bytes, hard_bytes=hard_bytes):
                self._answer(call, now_s, granted=True)
                call.soft_bytes, call.hard_bytes = soft_bytes, hard_bytes
            case Kill():
                self._answer(call, now_s, granted=False)
                call.killed = True
            case Wait():
                pass
            case _:
                return OutcomeStatus.REJECTED  # a rung that this world does not have
        return OutcomeStatus.COMPLETED

    def _answer(self, call: Call, now_s: float, granted: bool) -> None:
        if call.stopped_s is not None:
            self.stops.append(Stop(call.id, call.stopped_s, now_s, granted))
            call.stopped_s = None
            call.speed = THROTTLED_SPEED if call.throttle else 1.0

    def _throttle_over(self, call: Call, now_s: float) -> None:
        assert call.throttle is not None
        at_ns = round(now_s * NS_PER_S)
        if self._emit:
            self._emit(OutcomeObserved(at_ns, Outcome(call.throttle[0], OutcomeStatus.EXPIRED, at_ns, "world")))
        self._unthrottle(call)

    def _unthrottle(self, call: Call) -> None:
        call.throttle = None
        call.speed = 1.0 if call.speed else 0.0
