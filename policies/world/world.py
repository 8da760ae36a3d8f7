"""A host in virtual time: agents play scripts, tools use RAM, an engine computes turns, a policy is in force.

Owns the clock and the order of things at one instant: tools, then the engine, then the agents, then the daemon. Time
jumps from one event to the next; the same scripts, machine and plan give the same run. It decides nothing itself.
Long for saying what a real host would tell of it, field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

from ..estimate import command_kind
from ..events import (
    EngineAttached,
    Event,
    HostSampled,
    KvObserved,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallEnded,
    ToolCallStarted,
    TurnEnded,
    TurnStarted,
)
from ..model import (
    NS_PER_S,
    CgroupId,
    EngineId,
    EngineTotals,
    FinishReason,
    KvTier,
    Sandbox,
    Session,
    SessionId,
    SessionPhase,
    TenantId,
    ToolCallId,
    ToolCallSource,
)
from ..model import Engine as EngineFacts
from ..policy import Policy
from .daemon import Daemon, decide_on_tools
from .engine.engine import Engine
from .engine.seat import Seat, Stage
from .machine import Machine
from .names import Plan
from .score import Score, Tally, score
from .script import Script
from .tools import Call, Keeping, Tools

ENGINE = EngineId("world")
DIRECTIVES = frozenset(
    {"set_tenant_weight", "swap_out", "swap_in", "retain", "drop", "hold", "release", "set_host_tier_capacity"}
)
RESERVE_RATIO = 0.03
"""Of host RAM that a host tier which follows the tools leaves free for what they take next."""
UNLIMITED = 1000
_PHASES = {Stage.IDLE: SessionPhase.IDLE, Stage.WAITING: SessionPhase.WAITING}


@dataclass(frozen=True, slots=True)
class Room:
    """What there is. `ram_bytes` is what the host tier and the tools share; the device's memory is not in it."""

    device_tokens: int
    ram_bytes: int
    disk_bytes: int = 0
    """0: no disk tier."""


@dataclass(slots=True)
class Agent:
    script: Script
    seat: Seat
    cgroup: CgroupId
    turn: int = 0
    """Next to be asked for."""
    turn_id: str = ""
    """Of the turn last asked for, unique in the engine."""
    running: set[ToolCallId] = field(default_factory=set)
    wake_s: float = 0.0
    """When it asks for its next turn; infinity while a turn or a tool runs."""
    spoilt: bool = False
    """A call of the turn that follows was killed."""
    killed_count: int = 0
    done_s: float | None = None


class World:
    """Plays scripts under a plan. `daemon` is there exactly where the plan has decide() in force."""

    def __init__(
        self,
        scripts: Sequence[Script],
        machine: Machine,
        room: Room,
        plan: Plan,
        *,
        policy: Policy | None = None,
        weights: Mapping[str, float] | None = None,
        steady: bool = False,
        daemon: Daemon | None = None,
    ) -> None:
        """Args:
        policy: for decide(); its tool pool, where it has none, is what the host tier leaves of the RAM.
        weights: of tenants, 1 where not said.
        steady: an agent whose script is over takes the next one of all, so that the mix stays what it is.
        daemon: in place of the one that the plan asks for.

        Raises:
            ValueError: there is no script, or a turn that the device can not hold.
        """
        longest = max((script.peak_tokens for script in scripts), default=0)
        if not scripts or longest > room.device_tokens:
            raise ValueError(f"a turn of {longest} tokens does not fit a device of {room.device_tokens}")
        self.now_s = 0.0
        self.plan = plan
        self.room = room
        self.machine = machine
        self.host_limit_bytes: int | None = None
        """Of the host tier, as last said by a directive; None: nobody has."""
        self.tally = Tally()
        self.weights = {script.tenant: (weights or {}).get(script.tenant, 1.0) for script in scripts}
        self.daemon = daemon or self._daemon(policy or Policy(name="world"))
        self._scripts = tuple(scripts)
        self._steady = steady
        self._next_script = 0
        self._last_call = self._last_turn = 0
        sessions = {
            SessionId(f"{script.tenant}/{script.name}"): (script.tenant, self.weights[script.tenant])
            for script in scripts
        }
        more = UNLIMITED if plan.unlimited else 1
        disk = room.disk_bytes if machine.cost.disk_bytes_per_second else 0
        self.engine = Engine(
            machine, room.device_tokens * more, disk, self.host_capacity_bytes, plan.rule, sessions, self.tally
        )
        emit = self.daemon.hear if self.daemon else None
        self.tools = Tools(plan.keeping, self.tool_room_bytes, self.tally, emit)
        self.agents = [
            Agent(script, seat, CgroupId(number))
            for number, (script, seat) in enumerate(zip(scripts, self.engine.seats, strict=True), 1)
        ]
        self._by_session = {agent.seat.session: agent for agent in self.agents}
        self._tell(lambda: EngineAttached(0, self._facts()))
        for agent in self.agents:
            self._register(agent)

    def _daemon(self, policy: Policy) -> Daemon | None:
        if not self.plan.decides:
            return None
        policy = replace(policy, kv=replace(policy.kv, without=self.plan.without))
        if self.plan.door is not None:
            policy = replace(policy, kv=replace(policy.kv, door_ratio=self.plan.door))
        if policy.memory.tool_pool_bytes is None:
            share = self.plan.rule.host_share or 0.0
            pool = int((1.0 - share) * self.room.ram_bytes)
            policy = replace(policy, memory=replace(policy.memory, tool_pool_bytes=pool))
        return Daemon(policy, decide_on_tools) if self.plan.decides == "tools" else Daemon(policy)

    # -- what there is

    def host_capacity_bytes(self) -> float:
        """Of the host tier, now."""
        ram = self.room.ram_bytes
        if self.plan.rule.host_share is not None:
            fixed = self.plan.rule.host_share * ram
            return fixed if self.host_limit_bytes is None else min(fixed, self.host_limit_bytes)
        left = (1.0 - RESERVE_RATIO) * ram - self.tools.used_bytes - self._runtime_bytes()
        return max(0.0, left if self.host_limit_bytes is None else min(left, self.host_limit_bytes))

    def tool_room_bytes(self) -> float:
        """What all tool calls together may use: what a fixed host tier leaves, or all of the RAM where it follows."""
        share = self.plan.rule.host_share or 0.0
        if self.plan.keeping is Keeping.NOBODY:
            return self.room.ram_bytes - self.engine.tiers.host_bytes - self._runtime_bytes()
        return (1.0 - share) * self.room.ram_bytes - self._runtime_bytes()

    def _runtime_bytes(self) -> int:
        return sum(agent.script.runtime_bytes for agent in self.agents if not agent.running and agent.done_s is None)

    @property
    def done(self) -> bool:
        return all(agent.done_s is not None for agent in self.agents)

    # -- time

    def run(self, until_s: float = inf, progress: Callable[[float], None] | None = None) -> World:
        """Until every script is done, or `until_s`. `progress` is told the time now and then."""
        count = 0
        while not self.done and self.now_s < until_s:
            self.step(until_s)
            count += 1
            if progress is not None and count % 1000 == 0:
                progress(self.now_s)
        return self

    def step(self, until_s: float = inf) -> None:
        """Jump to the next instant at which anything happens, and let it happen."""
        wakes = min(agent.wake_s for agent in self.agents)
        daemon_s = self.daemon.next_s() if self.daemon else inf
        to_s = max(self.now_s, min(self.engine.next_s(), self.tools.next_s(), wakes, daemon_s, until_s))
        assert to_s < inf, f"nothing will ever happen again: {self.unfinished()}"
        self.engine.advance(to_s)
        self.now_s = to_s
        before = self.tools.used_bytes
        for call in self.tools.step(to_s):
            self._call_over(call)
        if self.tools.keep(to_s):
            for call in self.tools.calls.values():
                self.agents[call.agent].seat.call_lost_s = call.lost_s
        if self.tools.used_bytes != before:
            self.engine.squeeze()
        for seat in self.engine.step():
            self._turn_over(self._by_session[seat.session])
        for agent in self.agents:
            if agent.wake_s <= to_s:
                self._wake(agent)
        if self.daemon and self.daemon.next_s() <= to_s:
            self.daemon.turn(self)

    def unfinished(self) -> str:
        late = (a for a in self.agents if a.done_s is None)
        return ", ".join(f"{a.script.name} in turn {a.turn} ({a.seat.stage.value})" for a in late)

    def measure_from_now(self) -> None:
        """The warm-up is over."""
        self.tally.restart(self.now_s)

    def score(self) -> Score:
        disk = self.machine.cost.disk_bytes_per_second if self.engine.disk_present else 0.0
        return score(self.plan.name, self.tally, self.now_s, self.weights, self.machine.gamma, disk)

    # -- agents and their tools

    def _wake(self, agent: Agent) -> None:
        if agent.turn < len(agent.script.turns):
            self._ask(agent)
            return
        if self._steady:
            self.engine.close(agent.seat)
            agent.script = self._another(agent)
            agent.turn = 0
            self._ask(agent)
            return
        agent.done_s, agent.wake_s = self.now_s, inf
        self.engine.close(agent.seat)
        self._tell(lambda: SandboxRemoved(self._ns(), agent.cgroup))

    def _another(self, agent: Agent) -> Script:
        taken = self._scripts[self._next_script % len(self._scripts)]
        self._next_script += 1
        return replace(taken, tenant=agent.script.tenant, name=agent.script.name)

    def _ask(self, agent: Agent) -> None:
        turn = agent.script.turns[agent.turn]
        agent.wake_s = inf
        self._last_turn += 1
        agent.turn_id, prompt = f"t{self._last_turn}", turn.prompt_tokens
        self._tell(lambda: TurnStarted(self._ns(), ENGINE, agent.seat.session, agent.turn_id, prompt, 0))
        self.engine.ask(agent.seat, turn.prompt_tokens, turn.output_tokens)

    def _turn_over(self, agent: Agent) -> None:
        seat, turn = agent.seat, agent.script.turns[agent.turn]
        self._tell(lambda: self._ended(seat, agent.turn_id, bool(turn.tools)))
        if agent.spoilt:
            self.tally.spoilt_count += 1
        else:
            self.tally.turn_count += 1
        agent.turn += 1
        agent.spoilt = False
        if not turn.tools:
            agent.wake_s = self.now_s + turn.pause_s
        for tool in turn.tools:
            self._last_call += 1
            budget = self.daemon.policy.memory.budget_for(command_kind(tool.command)) if self.daemon else None
            soft, hard = (budget.soft_bytes, budget.hard_bytes) if budget else (0, 0)
            number = agent.cgroup - 1
            call = Call(ToolCallId(self._last_call), tool, number, soft, hard, self.now_s, self.now_s)
            agent.running.add(call.id)
            self.tools.start(call)
            self._tell(partial(self._started, agent, call))
            if not seat.kind:
                seat.kind = command_kind(tool.command)
                seat.call_since_s, seat.call_lost_s = self.now_s, 0.0
        self.engine.ahead()

    def _call_over(self, call: Call) -> None:
        agent = self.agents[call.agent]
        agent.running.discard(call.id)
        if call.killed:
            agent.killed_count += 1
            agent.spoilt = True
        else:
            seconds = max(0.0, self.now_s - call.started_s - call.lost_s)
            self.engine.waits.observe(command_kind(call.tool.command), seconds, call.tool.peak_bytes)
        exit_code, signal = (None, 9) if call.killed else (0, None)
        self._tell(lambda: ToolCallEnded(self._ns(), call.id, exit_code, signal))
        if not agent.running:
            agent.wake_s = self.now_s + agent.script.turns[agent.turn - 1].pause_s

    # -- what a host tells its daemon

    def _ns(self) -> int:
        return round(self.now_s * NS_PER_S)

    def _tell(self, event: Callable[[], Event]) -> None:
        if self.daemon is not None:
            self.daemon.hear(event())

    def _register(self, agent: Agent) -> None:
        script = agent.script
        box = Sandbox(
            agent.cgroup,
            TenantId(script.tenant),
            script.name,
            f"world/{script.name}",
            agent.seat.session,
            None,
            registered_ns=0,
        )
        self._tell(lambda: SandboxRegistered(0, box))

    def _started(self, agent: Agent, call: Call) -> ToolCallStarted:
        return ToolCallStarted(
            at_ns=self._ns(),
            id=call.id,
            sandbox=agent.cgroup,
            command=call.tool.command,
            source=ToolCallSource.HOOK,
            confidence=1.0,
            soft_bytes=call.soft_bytes,
            hard_bytes=call.hard_bytes,
        )

    def _ended(self, seat: Seat, name: str, tools: bool) -> TurnEnded:
        return TurnEnded(
            at_ns=self._ns(),
            engine=ENGINE,
            session=seat.session,
            turn=name,
            finish_reason=FinishReason.TOOL_CALLS if tools else FinishReason.STOP,
            prompt_tokens=seat.prompt_tokens,
            cached_tokens=seat.cached_tokens,
            recomputed_tokens=seat.again_tokens,
            output_tokens=seat.output_tokens,
            ttft_ns=round((seat.first_s - seat.asked_s) * NS_PER_S),
            queued_ns=round((seat.began_s - seat.asked_s) * NS_PER_S),
        )

    def _facts(self) -> EngineFacts:
        return EngineFacts(
            id=ENGINE,
            kind="simulated",
            model=self.machine.name,
            pid=1,
            bytes_per_token=self.machine.bytes_per_token,
            device_capacity_tokens=self.engine.tiers.capacity_tokens,
            host_capacity_bytes=int(self.host_capacity_bytes()),
            disk_capacity_bytes=self.room.disk_bytes if self.engine.disk_present else 0,
            cost=self.machine.cost,
            supported_directives=DIRECTIVES,
        )

    def observe(self) -> None:
        """Emit what a host samples: its memory, and the engine's full picture."""
        tiers, per_token = self.engine.tiers, self.machine.bytes_per_token
        used = self.tools.used_bytes + tiers.host_bytes + self._runtime_bytes()
        free = max(0, self.room.ram_bytes - used)
        self._tell(lambda: HostSampled(self._ns(), self.room.ram_bytes, free, None, None))
        seats = [seat for seat in self.engine.seats if seat.context_tokens or seat.stage is not Stage.IDLE]
        waiting = sum(seat.stage is Stage.WAITING and seat.hold_until_s <= self.now_s for seat in seats)
        totals = EngineTotals(recomputed_tokens=self.tally.recomputed_tokens)
        self._tell(
            lambda: KvObserved(
                at_ns=self._ns(),
                engine=ENGINE,
                sessions=tuple(self._session(seat) for seat in seats),
                device_used_tokens=tiers.device_tokens + tiers.booked_tokens,
                host_used_bytes=tiers.host_bytes,
                disk_used_bytes=tiers.disk_tokens * per_token,
                device_capacity_tokens=tiers.capacity_tokens,
                host_capacity_bytes=int(self.host_capacity_bytes()),
                running_count=sum(seat.stage not in _PHASES for seat in seats),
                waiting_count=waiting,
                totals=totals,
            )
        )

    def _session(self, seat: Seat) -> Session:
        per_token = self.machine.bytes_per_token
        held = seat.stage is Stage.WAITING and seat.hold_until_s > self.now_s
        return Session(
            id=seat.session,
            tenant=TenantId(seat.tenant),
            engine=ENGINE,
            phase=SessionPhase.HELD if held else _PHASES.get(seat.stage, SessionPhase.RUNNING),
            tier=seat.tier if seat.held_tokens else KvTier.NONE,
            held_tokens=seat.held_tokens,
            context_tokens=max(seat.context_tokens, seat.prompt_tokens if seat.stage is not Stage.IDLE else 0),
            host_bytes=seat.host_tokens * per_token,
            disk_bytes=seat.disk_tokens * per_token,
            retain_until_ns=round(seat.retain_until_s * NS_PER_S),
        )
