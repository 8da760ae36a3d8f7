"""A host in virtual time: agents, a kernel that stops calls at budgets, an engine with three tiers.

Owns the world that the pure core is replayed in: agents take turns and run tools as their scripts say, memory follows
each tool's curve and the policy's actions take effect; the engine's side is in `simulated_engine.py`. It decides
nothing itself, and every decision is checked against the laws. Time is a number; nothing sleeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from equipoise.policies.actions import (
    Action,
    Decision,
    Drop,
    Freeze,
    Grant,
    Kill,
    Outcome,
    OutcomeStatus,
    Retain,
    SetHostTierCapacity,
    SetTenantWeight,
    SwapIn,
    SwapOut,
    Thaw,
    Throttle,
    Wait,
)
from equipoise.policies.events import (
    BudgetLevel,
    BudgetReached,
    DecisionMade,
    EngineAttached,
    Event,
    HostSampled,
    OutcomeObserved,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallStarted,
)
from equipoise.policies.model import (
    NS_PER_S,
    CgroupId,
    DecisionId,
    Engine,
    FinishReason,
    Sandbox,
    SessionId,
    TenantId,
    ToolCallId,
    ToolCallSource,
)
from equipoise.policies.policy import Policy
from equipoise.policies.state import State
from equipoise.tests.policies.laws import decide_lawfully
from equipoise.tests.policies.scripts import Script, Tool
from equipoise.tests.policies.simulated_engine import SimulatedEngine

TICK_NS = NS_PER_S // 10
THROTTLED_SPEED = 0.2


@dataclass(slots=True)
class _Running:
    """A tool call that has processes."""

    id: ToolCallId
    tool: Tool
    soft_bytes: int
    hard_bytes: int
    worked_s: float = 0.0
    used_bytes: int = 0
    stopped_ns: int | None = None
    throttle: tuple[DecisionId, int] | None = None
    """Who slowed it down, until when."""
    killed: bool = False
    told_soft: bool = False


@dataclass(slots=True)
class _Agent:
    script: Script
    cgroup: CgroupId
    session: SessionId
    next_round: int = 0
    turn_left_s: float | None = None
    """None: no turn is computed."""
    running: dict[ToolCallId, _Running] = field(default_factory=dict)
    killed_count: int = 0
    done_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """One call that stood at its budget, and how it was answered."""

    tool_call: ToolCallId
    at_ns: int
    answered_ns: int
    granted: bool


class Simulation:
    """Runs scripts to their end under a policy. `log` holds every decision with its outcome's status."""

    def __init__(self, scripts: Sequence[Script], policy: Policy, engine: Engine, host_bytes: int = 64 << 30) -> None:
        self.now_ns = 0
        self.state = State(policy)
        self.log: list[tuple[Decision, OutcomeStatus]] = []
        self.stops: list[Stop] = []
        self.highest_bytes = 0
        """Most that all tool calls ever used together."""
        self._policy = policy
        self._host_bytes = host_bytes
        self._agents = [
            _Agent(script, CgroupId(number), SessionId(f"{script.tenant}/{script.name}"))
            for number, script in enumerate(scripts, 1)
        ]
        self._last_id = 0
        self._events: list[Event] = [EngineAttached(0, engine)]
        tenants = {agent.session: TenantId(agent.script.tenant) for agent in self._agents}
        self._engine = SimulatedEngine(engine, tenants, self._events)
        for agent in self._agents:
            self._register(agent)

    @property
    def done(self) -> bool:
        return all(agent.done_ns is not None for agent in self._agents)

    @property
    def recomputed_tokens(self) -> int:
        return self._engine.recomputed_tokens

    def actions(self, kind: type[Action]) -> list[Decision]:
        return [decision for decision, _ in self.log if isinstance(decision.action, kind)]

    def finished_ns(self, name: str) -> int | None:
        return next(agent.done_ns for agent in self._agents if agent.script.name == name)

    def killed_count(self, name: str) -> int:
        return next(agent.killed_count for agent in self._agents if agent.script.name == name)

    def run(self, at_most_s: float) -> None:
        """Until every script is done. Raises AssertionError where one is not within `at_most_s`."""
        while not self.done:
            assert self.now_ns < at_most_s * NS_PER_S, f"not done after {at_most_s} s: {self._unfinished()}"
            self.tick()

    def tick(self) -> None:
        self.now_ns += TICK_NS
        for agent in self._agents:
            self._advance(agent)
        self._observe()
        for event in self._events:
            self.state.apply(event)
        self._events.clear()
        self.state.check_integrity()
        for decision in decide_lawfully(self.state.snapshot(self.now_ns), self._policy):
            self.state.apply(DecisionMade(self.now_ns, decision))
            status = self._carry_out(decision)
            self.log.append((decision, status))
            self.state.apply(OutcomeObserved(self.now_ns, Outcome(decision.id, status, self.now_ns, "simulated")))

    # -- agents and their tools

    def _register(self, agent: _Agent) -> None:
        script = agent.script
        box = Sandbox(
            agent.cgroup,
            TenantId(script.tenant),
            script.name,
            f"sim/{script.name}",
            agent.session,
            None,
            registered_ns=0,
        )
        self._events.append(SandboxRegistered(0, box))

    def _advance(self, agent: _Agent) -> None:
        if agent.done_ns is not None:
            return
        if agent.running:
            for call in list(agent.running.values()):
                self._work(agent, call)
            return  # the agent reads the output before it asks again
        if agent.turn_left_s is not None:
            agent.turn_left_s -= TICK_NS / NS_PER_S
            if agent.turn_left_s <= 0:
                self._end_turn(agent)
        elif agent.next_round < len(agent.script.rounds):
            self._begin_turn(agent)
        else:
            agent.done_ns = self.now_ns
            self._engine.close(agent.session)
            self._events.append(SandboxRemoved(self.now_ns, agent.cgroup))

    def _begin_turn(self, agent: _Agent) -> None:
        turn = agent.script.rounds[agent.next_round]
        agent.turn_left_s = turn.turn_seconds
        self._engine.begin_turn(agent.session, agent.next_round, turn.context_tokens, self.now_ns)

    def _end_turn(self, agent: _Agent) -> None:
        turn = agent.script.rounds[agent.next_round]
        agent.turn_left_s = None
        reason = FinishReason.TOOL_CALLS if turn.tools else FinishReason.STOP
        self._engine.end_turn(agent.session, agent.next_round, turn.context_tokens, reason, self.now_ns)
        agent.next_round += 1
        for tool in turn.tools:
            self._last_id += 1
            budget = self._policy.memory.budget
            call = _Running(ToolCallId(self._last_id), tool, budget.soft_bytes, budget.hard_bytes)
            agent.running[call.id] = call
            self._events.append(
                ToolCallStarted(
                    at_ns=self.now_ns,
                    id=call.id,
                    sandbox=agent.cgroup,
                    command=tool.command,
                    source=ToolCallSource.HOOK,
                    confidence=1.0,
                    soft_bytes=call.soft_bytes,
                    hard_bytes=call.hard_bytes,
                )
            )

    def _work(self, agent: _Agent, call: _Running) -> None:
        if call.killed:
            agent.killed_count += 1
            self._end(agent, call, signal=9)
            return
        if call.throttle is not None and call.throttle[1] <= self.now_ns:
            outcome = Outcome(call.throttle[0], OutcomeStatus.EXPIRED, self.now_ns, "simulated")
            self._events.append(OutcomeObserved(self.now_ns, outcome))
            call.throttle = None
        if call.stopped_ns is not None:
            return
        call.worked_s += TICK_NS / NS_PER_S * (THROTTLED_SPEED if call.throttle else 1.0)
        wanted = call.tool.bytes_at(call.worked_s)
        if wanted > call.hard_bytes:
            self._stop(call)
        else:
            self._use(call, wanted)
            if call.worked_s >= call.tool.seconds:
                self._end(agent, call)

    def _stop(self, call: _Running) -> None:
        """As the kernel does it: at the budget and a page or two over."""
        call.stopped_ns = self.now_ns
        self._use(call, call.hard_bytes + 64 * 1024)
        level, pid = BudgetLevel.HARD, int(call.id)
        self._events.append(BudgetReached(self.now_ns, call.id, level, call.hard_bytes, call.used_bytes, pid))

    def _use(self, call: _Running, used_bytes: int) -> None:
        if used_bytes != call.used_bytes:
            call.used_bytes = used_bytes
            self._events.append(ToolCallMemoryStepped(self.now_ns, call.id, used_bytes, used_bytes))

    def _end(self, agent: _Agent, call: _Running, signal: int | None = None) -> None:
        del agent.running[call.id]
        self._events.append(ToolCallEnded(self.now_ns, call.id, None if signal else 0, signal))

    def _calls(self) -> dict[ToolCallId, _Running]:
        return {call.id: call for agent in self._agents for call in agent.running.values()}

    def _unfinished(self) -> str:
        return ", ".join(f"{a.script.name} in round {a.next_round}" for a in self._agents if a.done_ns is None)

    def _observe(self) -> None:
        used = sum(call.used_bytes for call in self._calls().values())
        self.highest_bytes = max(self.highest_bytes, used)
        self._engine.report(self.now_ns)
        free = self._host_bytes - used - self._engine.host_tier_bytes()
        self._events.append(HostSampled(self.now_ns, self._host_bytes, max(0, free), None, None))

    # -- the policy's actions

    def _carry_out(self, decision: Decision) -> OutcomeStatus:
        match decision.action:
            case SwapOut() | SwapIn() | Retain() | Drop() | SetTenantWeight() | SetHostTierCapacity() as directive:
                return self._engine.obey(directive, decision, self.now_ns)
            case Throttle() | Freeze() | Thaw() | Grant() | Wait() | Kill() as action:
                call = self._calls().get(action.tool_call)
                if call is None:
                    return OutcomeStatus.GONE
                return self._act(action, call, decision)

    def _act(
        self, action: Throttle | Freeze | Thaw | Grant | Wait | Kill, call: _Running, decision: Decision
    ) -> OutcomeStatus:
        match action:
            case Throttle():
                call.throttle = (decision.id, action.expires_ns)
            case Thaw():
                call.throttle = None
            case Grant():
                assert call.stopped_ns is not None
                self.stops.append(Stop(call.id, call.stopped_ns, self.now_ns, granted=True))
                call.stopped_ns, call.hard_bytes, call.soft_bytes = None, action.hard_bytes, action.soft_bytes
            case Kill():
                # A call that goes on pays too, where it was granted what another waited for in vain.
                assert call.stopped_ns is not None or call.used_bytes > self._policy.memory.budget.hard_bytes
                if call.stopped_ns is not None:
                    self.stops.append(Stop(call.id, call.stopped_ns, self.now_ns, granted=False))
                call.killed = True
            case Wait():
                pass
            case Freeze():
                return OutcomeStatus.REJECTED
        return OutcomeStatus.COMPLETED
