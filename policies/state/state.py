"""The one mutable picture of the host. Events go in through `apply`, a frozen Snapshot comes out.

Owns the meaning of events. One owner drives it (the daemon's loop, or a replay); it has no clock: time comes with the
events and with `snapshot(now_ns)`. It mutates in place, because a replay of 10,000 sessions would otherwise spend its
time copying; what leaves it is frozen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from ..accounting import SessionCost
from ..actions import (
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
from ..correlate import Covariance, held_bytes, meanwhile
from ..estimate import Estimates, command_kind
from ..events import (
    BudgetChanged,
    BudgetLevel,
    BudgetReached,
    DecisionMade,
    EngineAttached,
    EngineDetached,
    Event,
    EventsLost,
    HostSampled,
    IntentDeclared,
    KvObserved,
    OutcomeObserved,
    PolicyApplied,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    SandboxSampled,
    SessionMoved,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
    TurnEnded,
    TurnPreempted,
    TurnStarted,
)
from ..model import (
    NS_PER_S,
    STALLED,
    CgroupId,
    DecisionId,
    Engine,
    EngineId,
    Host,
    KvTier,
    Sandbox,
    Session,
    SessionId,
    SessionPhase,
    TenantId,
    ToolCall,
    ToolCallId,
    ToolCallPhase,
    ToolCallSource,
    Verdict,
)
from ..policy import Policy
from ..snapshot import Snapshot

REMEMBER_NS = 60 * NS_PER_S
"""How long a finished tool call stays in the picture."""
_RANK = {ToolCallSource.LINEAGE: 0, ToolCallSource.HOOK: 1, ToolCallSource.WRAPPER: 2}
_HELD_BACK = (ToolCallPhase.FROZEN, ToolCallPhase.THROTTLED)
_UNDONE = (OutcomeStatus.EXPIRED, OutcomeStatus.REJECTED, OutcomeStatus.FAILED)


class State:
    """Tenants, sandboxes, tool calls, sessions and engines as they are known now.

    Invariants (`check_integrity`): every tool call's sandbox was registered when it started; an alias never points at
    an alias; a session in the picture belongs to an engine in the picture.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.host = Host()
        self.sandboxes: dict[CgroupId, Sandbox] = {}
        self.tool_calls: dict[ToolCallId, ToolCall] = {}
        self.sessions: dict[SessionId, Session] = {}
        self.engines: dict[EngineId, Engine] = {}
        self.estimates = Estimates()
        self.covariance = Covariance()
        """Memory of all tool calls against KV on all devices, sampled with the host."""
        self.lost_count = 0
        self.late_count = 0
        """Events about something that is not, or no longer, known."""
        self._aliases: dict[ToolCallId, ToolCallId] = {}
        self._wrappers: set[ToolCallId] = set()
        """Aliases with processes of their own: what the kernel says of those is not about the call they wrap."""
        self._accrued_ns: dict[ToolCallId, int] = {}
        self._intents: dict[tuple[CgroupId, str], IntentDeclared] = {}
        self._decisions: dict[DecisionId, Decision] = {}
        self._weights: set[tuple[EngineId, TenantId, float]] = set()
        self._left_behind: set[SessionId] = set()
        self._early_costs: dict[SessionId, tuple[EngineId, SessionCost]] = {}
        """Of sessions whose turns ended before their engine's first picture of them."""
        self._pressure_since_ns: int | None = None

    def resolve(self, tool_call: ToolCallId) -> ToolCallId:
        """The id under which a merged tool call is known now."""
        return self._aliases.get(tool_call, tool_call)

    def apply(self, event: Event) -> State:  # noqa: PLR0912, PLR0915 - one arm per event of a closed union
        """Take in one event; returns itself. Never raises: an event about the unknown is counted as late."""
        match event:
            case PolicyApplied():
                self.policy = event.policy
            case SandboxRegistered():
                self.sandboxes[event.sandbox.cgroup_id] = event.sandbox
                self._left_behind.discard(event.sandbox.session)
            case SandboxRemoved():
                removed = self.sandboxes.pop(event.cgroup_id, None)
                if removed and all(s.session != removed.session for s in self.sandboxes.values()):
                    self._left_behind.add(removed.session)
                self._intents = {key: i for key, i in self._intents.items() if key[0] != event.cgroup_id}
            case SandboxSampled():
                self._sandbox_sampled(event)
            case HostSampled():
                self._host_sampled(event)
            case ToolCallStarted():
                self._tool_call_started(event)
            case ToolCallAttributed():
                self._attributed(event)
            case ToolCallMerged():
                self._merged(event)
            case ToolCallMemoryStepped():
                self._memory_stepped(event)
            case BudgetReached():
                self._budget_reached(event)
            case BudgetChanged():
                # A wrapper's own budget is not that of the call it was merged into.
                if event.id not in self._wrappers and (call := self._known(event.id)):
                    self._put(replace(call, soft_bytes=event.soft_bytes, hard_bytes=event.hard_bytes))
                    if not event.hard_bytes and call.stopped_ns is not None:
                        self._answered(call.id, ToolCallPhase.RUNNING, event.at_ns)
            case ToolCallEnded():
                self._ended(event)
            case ProcessesGone():
                if event.id not in self._wrappers and (call := self._known(event.id)):
                    self._put(replace(call, gone_ns=event.at_ns, used_bytes=0, stopped_ns=None))
            case IntentDeclared():
                self._intents[(event.sandbox, event.kind)] = event
            case EngineAttached():
                self._accrue_all(event.at_ns)
                self.engines[event.engine.id] = event.engine
                self._weights = {told for told in self._weights if told[0] != event.engine.id}
            case EngineDetached():
                self._engine_detached(event)
            case KvObserved():
                self._kv_observed(event)
            case TurnStarted():
                self._turn_started(event)
            case TurnEnded():
                self._turn_ended(event)
            case SessionMoved():
                self._session_moved(event)
            case TurnPreempted():
                pass  # the occupancy report that follows says where its KV is
            case DecisionMade():
                self._decided(event.decision)
            case OutcomeObserved():
                self._outcome(event.outcome)
            case EventsLost():
                self.lost_count += event.count
            case _:
                assert_never(event)
        return self

    def snapshot(self, now_ns: int) -> Snapshot:
        """The picture at now_ns; forgets tool calls that finished long ago."""
        self._forget(now_ns)
        self._watch_pressure(now_ns)
        return Snapshot(
            now_ns=now_ns,
            host=self.host,
            tenants=self.policy.tenants,
            sandboxes=tuple(self.sandboxes[key] for key in sorted(self.sandboxes)),
            tool_calls=tuple(self.tool_calls[key] for key in sorted(self.tool_calls)),
            sessions=tuple(self.sessions[key] for key in sorted(self.sessions)),
            engines=tuple(self.engines[key] for key in sorted(self.engines)),
            estimates=self.estimates,
            pressure_since_ns=self._pressure_since_ns,
            weights_told=frozenset(self._weights),
            left_behind=frozenset(self._left_behind & self.sessions.keys()),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant is broken; for tests."""
        for alias, target in self._aliases.items():
            assert target not in self._aliases, f"alias {alias:x} points at an alias"
        for call in self.tool_calls.values():
            assert call.peak_bytes >= call.used_bytes, f"{call.id:x}: peak below use"
            assert (call.end_ns is not None) == (call.phase is ToolCallPhase.ENDED), f"{call.id:x}: phase, end"
            assert call.end_ns is None or call.end_ns >= call.start_ns, f"{call.id:x}: ends before it starts"
            assert call.gone_ns is None or call.used_bytes == 0, f"{call.id:x}: gone and uses memory"
            if call.phase is ToolCallPhase.STOPPED and call.gone_ns is None:
                assert call.stopped_ns is not None, f"{call.id:x}: stopped, but not since when"
        for session in self.sessions.values():
            assert session.engine in self.engines, f"{session.id}: its engine is unknown"
            assert session.held_tokens <= session.context_tokens, f"{session.id}: holds more than its context"

    # -- tool calls

    def _known(self, tool_call: ToolCallId) -> ToolCall | None:
        call = self.tool_calls.get(self.resolve(tool_call))
        if call is None:
            self.late_count += 1
        return call

    def _put(self, call: ToolCall) -> None:
        self.tool_calls[call.id] = call

    def _tool_call_started(self, event: ToolCallStarted) -> None:
        sandbox = self.sandboxes.get(event.sandbox)
        if sandbox is None:
            self.late_count += 1
            return
        if self.resolve(event.id) in self.tool_calls:
            return  # told twice; the first stands
        if event.earlier is not None:
            self._goes_on(event, event.earlier)
            return
        kind = command_kind(event.command)
        intent = self._intents.pop((event.sandbox, kind), None)
        self._accrued_ns[event.id] = event.at_ns
        self._put(
            ToolCall(
                id=event.id,
                tenant=sandbox.tenant,
                sandbox=event.sandbox,
                session=event.session or sandbox.session,
                command=event.command,
                kind=kind,
                source=event.source,
                confidence=event.confidence,
                start_ns=event.at_ns,
                pid=event.pid,
                phase_since_ns=event.at_ns,
                soft_bytes=event.soft_bytes,
                hard_bytes=event.hard_bytes,
                expected_bytes=intent.expected_bytes if intent else None,
                expected_ns=intent.expected_ns if intent else None,
            )
        )

    def _goes_on(self, event: ToolCallStarted, earlier: ToolCall) -> None:
        """Nobody is held back at a daemon's start, and what it uses is measured anew."""
        self._accrued_ns[event.id] = event.at_ns
        self._put(
            replace(
                earlier,
                phase=ToolCallPhase.RUNNING if earlier.end_ns is None else ToolCallPhase.ENDED,
                phase_since_ns=event.at_ns,
                used_bytes=0,
                soft_bytes=event.soft_bytes,
                hard_bytes=event.hard_bytes,
                gone_ns=None,
                stopped_ns=None,
                waiting_until_ns=None,
            )
        )

    def _attributed(self, event: ToolCallAttributed) -> None:
        call = self._known(event.id)
        if call is None or _RANK[event.source] < _RANK[call.source]:
            return
        command = event.command or call.command
        self._put(
            replace(
                call,
                source=event.source,
                confidence=max(call.confidence, event.confidence),
                command=command,
                kind=command_kind(command),
                session=event.session or call.session,
            )
        )

    def _merged(self, event: ToolCallMerged) -> None:
        announced, seen = self._known(event.id), self._known(event.into)
        if announced is None or seen is None or announced.id == seen.id:
            return
        told = announced if _RANK[announced.source] >= _RANK[seen.source] else seen
        # KV is charged from the earlier start on, to the session of whoever knows it best.
        first = announced if announced.start_ns <= seen.start_ns else seen
        charged = first if first.session == told.session else told
        charged_ns = self._accrued_ns.get(charged.id, charged.start_ns)
        self._accrued_ns.pop(announced.id, None)
        if seen.running:
            self._accrued_ns[seen.id] = charged_ns
        del self.tool_calls[announced.id]
        self._aliases[announced.id] = seen.id
        for alias, target in self._aliases.items():
            if target == announced.id:
                self._aliases[alias] = seen.id
        if announced.pid is not None:
            self._wrappers.add(announced.id)
        self._put(
            replace(
                seen,
                source=told.source,
                confidence=max(seen.confidence, announced.confidence),
                command=told.command,
                kind=told.kind,
                session=told.session,
                start_ns=first.start_ns,
                kv=charged.kv,
                verdict=charged.verdict,
                expected_bytes=told.expected_bytes or seen.expected_bytes,
                expected_ns=told.expected_ns or seen.expected_ns,
            )
        )

    def _memory_stepped(self, event: ToolCallMemoryStepped) -> None:
        if event.id in self._wrappers:
            return  # a wrapper's own few MiB: its call is measured under the id it was merged into
        call = self._known(event.id)
        if call is None:
            return
        peak_bytes = max(call.peak_bytes, event.peak_bytes, event.used_bytes)
        if peak_bytes > call.peak_bytes:
            kv = replace(call.kv, at_peak_bytes=self._held_bytes(call.session))
            call = replace(call, peak_bytes=peak_bytes, peak_ns=event.at_ns, kv=kv)
        if call.stopped_ns is not None and call.hard_bytes:
            # Its other threads and processes ran on until the stop reached them.
            overshoot = max(call.overshoot_bytes or 0, event.used_bytes - call.hard_bytes)
            call = replace(call, overshoot_bytes=overshoot)
        self._put(replace(call, used_bytes=event.used_bytes if call.gone_ns is None else 0))

    def _budget_reached(self, event: BudgetReached) -> None:
        if event.id in self._wrappers:
            return
        self._memory_stepped(ToolCallMemoryStepped(event.at_ns, event.id, event.used_bytes, event.used_bytes))
        call = self.tool_calls.get(self.resolve(event.id))
        if call is None or event.level is not BudgetLevel.HARD:
            return
        if call.phase is ToolCallPhase.KILLED or call.gone_ns is not None:
            return
        overshoot = max(0, event.used_bytes - event.budget_bytes)
        call = replace(
            call,
            overshoot_bytes=max(overshoot, call.overshoot_bytes or 0),
            hard_bytes=call.hard_bytes or event.budget_bytes,
            stopped_ns=call.stopped_ns if call.stopped_ns is not None else event.at_ns,
        )
        # An escapee can reach the budget after its call has ended: it is stopped all the same, the call stays ended.
        self._put(self._to_phase(call, ToolCallPhase.STOPPED, event.at_ns))

    def _to_phase(self, call: ToolCall, phase: ToolCallPhase, at_ns: int) -> ToolCall:
        """The call in its new phase. Nothing follows the end, and nothing but the end follows a kill."""
        if call.phase is phase or not call.running:
            return call
        if call.phase is ToolCallPhase.KILLED and phase is not ToolCallPhase.ENDED:
            return call
        stalled = max(0, at_ns - call.phase_since_ns) if call.phase in STALLED else 0
        return replace(
            call, phase=phase, phase_since_ns=at_ns, stalled_ns=call.stalled_ns + stalled, waiting_until_ns=None
        )

    def _ended(self, event: ToolCallEnded) -> None:
        if event.id in self._wrappers:
            return
        call = self._known(event.id)
        if call is None or not call.running:
            return
        self._accrue(call, event.at_ns)
        self._accrued_ns.pop(call.id, None)
        call = self.tool_calls[call.id]
        peak_bytes = max(call.peak_bytes, event.peak_bytes or 0)
        end_ns = max(event.at_ns, call.start_ns)
        was_killed = call.phase is ToolCallPhase.KILLED
        gone_ns = call.gone_ns if event.escaped_count or call.gone_ns is not None else end_ns
        if not call.peak_ns:  # too short for a step: the end is when its peak was seen
            kv = replace(call.kv, at_peak_bytes=self._held_bytes(call.session))
            call = replace(call, peak_ns=end_ns, kv=kv)
        if call.verdict is None and call.kv.held_bytes:
            call = replace(call, verdict=Verdict.KEEP)  # nothing was asked of the engine: it kept what it held
        call = self._to_phase(call, ToolCallPhase.ENDED, end_ns)
        self._put(
            replace(
                call,
                end_ns=end_ns,
                peak_bytes=peak_bytes,
                exit_code=event.exit_code,
                signal=event.signal,
                escaped_count=event.escaped_count,
                gone_ns=gone_ns,
                used_bytes=call.used_bytes if gone_ns is None else 0,
                stopped_ns=call.stopped_ns if gone_ns is None else None,
            )
        )
        if not was_killed:  # a killed call says how long it was let live, not how long it would have taken
            worked_ns = max(1, end_ns - call.start_ns - call.stalled_ns)
            self.estimates = self.estimates.observe(call.kind, worked_ns, peak_bytes)

    # -- the host

    def _sandbox_sampled(self, event: SandboxSampled) -> None:
        sandbox = self.sandboxes.get(event.cgroup_id)
        if sandbox is None:
            self.late_count += 1
            return
        peak_bytes = max(sandbox.peak_bytes, event.peak_bytes, event.memory_bytes)
        self.sandboxes[event.cgroup_id] = replace(
            sandbox, memory_bytes=event.memory_bytes, peak_bytes=peak_bytes, cpu_ns=event.cpu_ns
        )

    def _host_sampled(self, event: HostSampled) -> None:
        self.host = Host(
            memory_total_bytes=event.memory_total_bytes,
            memory_available_bytes=event.memory_available_bytes,
            psi_some_ratio=event.psi_some_ratio,
            psi_full_ratio=event.psi_full_ratio,
            gpu_total_bytes=event.gpu_total_bytes,
            gpu_used_bytes=event.gpu_used_bytes,
            observed_ns=event.at_ns,
        )
        tools = sum(c.used_bytes for c in self.tool_calls.values() if c.gone_ns is None)
        kv = sum(e.device_used_tokens * e.bytes_per_token for e in self.engines.values())
        self.covariance = self.covariance.observe(float(tools), float(kv))

    # -- engines and sessions

    def _held_bytes(self, session_id: SessionId) -> int:
        session = self.sessions.get(session_id)
        return held_bytes(session, self.engines[session.engine]) if session else 0

    def _accrue(self, call: ToolCall, to_ns: int) -> None:
        """Charge the call with the KV its session held since it was last charged."""
        session = self.sessions.get(call.session)
        from_ns = self._accrued_ns.get(call.id, to_ns)
        self._accrued_ns[call.id] = max(from_ns, to_ns)
        if session is not None:
            kv = meanwhile(call.kv, session, self.engines[session.engine], from_ns, to_ns)
            self._put(replace(call, kv=kv))

    def _accrue_all(self, to_ns: int) -> None:
        for call in [c for c in self.tool_calls.values() if c.running]:
            self._accrue(call, to_ns)

    def _engine_detached(self, event: EngineDetached) -> None:
        engine = self.engines.get(event.engine)
        if engine is None:
            self.late_count += 1
            return
        self._accrue_all(event.at_ns)
        self.engines[event.engine] = replace(
            engine,
            attached=False,
            device_used_tokens=0,
            host_used_bytes=0,
            disk_used_bytes=0,
            running_count=0,
            waiting_count=0,
        )
        self.sessions = {key: s for key, s in self.sessions.items() if s.engine != event.engine}
        self._weights = {told for told in self._weights if told[0] != event.engine}
        self._early_costs = {key: early for key, early in self._early_costs.items() if early[0] != event.engine}

    def _kv_observed(self, event: KvObserved) -> None:
        engine = self.engines.get(event.engine)
        if engine is None:
            self.late_count += 1
            return
        self._accrue_all(event.at_ns)
        self.engines[event.engine] = replace(
            engine,
            device_used_tokens=event.device_used_tokens,
            host_used_bytes=event.host_used_bytes,
            disk_used_bytes=event.disk_used_bytes,
            device_capacity_tokens=event.device_capacity_tokens,
            host_capacity_bytes=event.host_capacity_bytes,
            running_count=event.running_count,
            waiting_count=event.waiting_count,
            totals=event.totals,
            cost=event.cost or engine.cost,
            observed_ns=event.at_ns,
        )
        seen = {key: s for key, s in self.sessions.items() if s.engine != event.engine}
        for session in event.sessions:
            known = self.sessions.get(session.id, session)
            seen[session.id] = replace(  # what the engine does not report, we remember
                session,
                engine=event.engine,
                context_tokens=max(session.context_tokens, session.held_tokens),
                last_finish=known.last_finish,
                turn_count=known.turn_count,
                verdict=known.verdict,
                verdict_ns=known.verdict_ns,
                cost=self._early_costs.get(session.id, (event.engine, known.cost))[1],
            )
        self.sessions = seen
        # The picture is whole: a session that is not in it is gone, and its early costs with it.
        self._early_costs = {key: early for key, early in self._early_costs.items() if early[0] != event.engine}

    def _turn_started(self, event: TurnStarted) -> None:
        self._left_behind.discard(event.session)
        if session := self.sessions.get(event.session):
            self._accrue_all(event.at_ns)
            self.sessions[session.id] = replace(
                session, phase=SessionPhase.RUNNING, turn_count=session.turn_count + 1, verdict=None, verdict_ns=0
            )

    def _turn_ended(self, event: TurnEnded) -> None:
        if session := self.sessions.get(event.session):
            self._accrue_all(event.at_ns)
            cost = session.cost.plus(event.cost)
            self.sessions[session.id] = replace(
                session, phase=SessionPhase.IDLE, last_finish=event.finish_reason, cost=cost
            )
        elif event.engine in self.engines:
            _, so_far = self._early_costs.get(event.session, (event.engine, SessionCost()))
            self._early_costs[event.session] = (event.engine, so_far.plus(event.cost))

    def _session_moved(self, event: SessionMoved) -> None:
        if session := self.sessions.get(event.session):
            self._accrue_all(event.at_ns)
            held = 0 if event.to_tier is KvTier.NONE else session.held_tokens
            self.sessions[session.id] = replace(session, tier=event.to_tier, held_tokens=held)

    # -- decisions and what came of them

    def _decided(self, decision: Decision) -> None:
        self._decisions[decision.id] = decision
        match decision.action:
            case SwapOut(session=session, tier=tier):
                verdict = Verdict.SWAP_DISK if tier is KvTier.DISK else Verdict.SWAP_HOST
                self._give_verdict(session, verdict, decision.at_ns)
            case Retain(session=session):
                self._give_verdict(session, Verdict.KEEP, decision.at_ns)
            case Drop(session=session):
                self._give_verdict(session, Verdict.DROP, decision.at_ns)
            case SwapIn(session=session):
                if known := self.sessions.get(session):
                    self.sessions[session] = replace(known, verdict=Verdict.KEEP, verdict_ns=decision.at_ns)
            case SetTenantWeight(engine=engine, tenant=tenant, weight=weight):
                self._weights = {told for told in self._weights if told[:2] != (engine, tenant)}
                self._weights.add((engine, tenant, weight))
            case Wait(tool_call=tool_call, expires_ns=expires_ns):
                if call := self._known(tool_call):
                    self._put(replace(call, waiting_until_ns=expires_ns))
            case Throttle() | Freeze() | Thaw() | Grant() | Kill() | SetHostTierCapacity():
                pass  # their effect is known when the outcome is

    def _give_verdict(self, session_id: SessionId, verdict: Verdict, at_ns: int) -> None:
        if session := self.sessions.get(session_id):
            self.sessions[session_id] = replace(session, verdict=verdict, verdict_ns=at_ns)
        for call in [c for c in self.tool_calls.values() if c.session == session_id and c.running]:
            self._put(replace(call, verdict=verdict))

    def _outcome(self, outcome: Outcome) -> None:
        decision = self._decisions.get(outcome.decision)
        if decision is None:
            self.late_count += 1
            return
        if outcome.status in (OutcomeStatus.COMPLETED, OutcomeStatus.CLIPPED):
            self._took_effect(decision.action, outcome.at_ns)
        elif outcome.status is OutcomeStatus.GONE:
            self._found_nothing(decision.action, outcome.at_ns)
        elif outcome.status in _UNDONE:
            self._did_not_hold(decision, outcome.at_ns)

    def _took_effect(self, action: Action, at_ns: int) -> None:
        match action:
            case Throttle(tool_call=tool_call):
                self._hold_back(tool_call, ToolCallPhase.THROTTLED, at_ns)
            case Freeze(tool_call=tool_call):
                self._hold_back(tool_call, ToolCallPhase.FROZEN, at_ns)
            case Thaw(tool_call=tool_call):
                self._let_go(tool_call, at_ns)
            case Grant(tool_call=tool_call, soft_bytes=soft, hard_bytes=hard):
                self._answered(tool_call, ToolCallPhase.RUNNING, at_ns)
                if call := self._known(tool_call):
                    self._put(replace(call, soft_bytes=soft, hard_bytes=hard, granted_ns=at_ns))
            case Kill(tool_call=tool_call):
                self._answered(tool_call, ToolCallPhase.KILLED, at_ns)
            case _:
                pass  # engines report the effect themselves

    def _found_nothing(self, action: Action, at_ns: int) -> None:
        """There was nothing left to end, to let go or to continue: asking again would find nothing again."""
        match action:
            case Kill(tool_call=tool_call):
                self._answered(tool_call, ToolCallPhase.KILLED, at_ns)
            case Grant(tool_call=tool_call):
                self._answered(tool_call, ToolCallPhase.RUNNING, at_ns)
            case Thaw(tool_call=tool_call):
                self._let_go(tool_call, at_ns)
            case _:
                pass  # what was not held back or moved has not changed

    def _did_not_hold(self, decision: Decision, at_ns: int) -> None:
        match decision.action:
            case Throttle(tool_call=tool_call) | Freeze(tool_call=tool_call):
                self._let_go(tool_call, at_ns)
            case SwapOut(session=session) | Retain(session=session) | Drop(session=session) | SwapIn(session=session):
                self._take_back_verdict(session, decision.at_ns)
            case SetTenantWeight(engine=engine, tenant=tenant, weight=weight):
                self._weights.discard((engine, tenant, weight))
            case _:
                pass

    def _take_back_verdict(self, session_id: SessionId, decided_ns: int) -> None:
        """The engine did not follow. The time of asking stays, so that it is not asked again before the dwell is over.

        A late answer to an older question changes nothing.
        """
        session = self.sessions.get(session_id)
        if session is None or session.verdict_ns != decided_ns:
            return
        self.sessions[session_id] = replace(session, verdict=None)
        for call in [c for c in self.tool_calls.values() if c.session == session_id and c.running]:
            self._put(replace(call, verdict=None))

    def _hold_back(self, tool_call: ToolCallId, phase: ToolCallPhase, at_ns: int) -> None:
        """Throttled or frozen, unless the kernel has stopped it meanwhile: only a stopped call is answered."""
        call = self._known(tool_call)
        if call is not None and call.phase in (ToolCallPhase.RUNNING, *_HELD_BACK):
            self._put(self._to_phase(call, phase, at_ns))

    def _let_go(self, tool_call: ToolCallId, at_ns: int) -> None:
        call = self._known(tool_call)
        if call is not None and call.phase in _HELD_BACK:
            self._put(self._to_phase(call, ToolCallPhase.RUNNING, at_ns))

    def _answered(self, tool_call: ToolCallId, phase: ToolCallPhase, at_ns: int) -> None:
        """A call that stood at its budget was granted more, or ended."""
        if call := self._known(tool_call):
            self._put(replace(self._to_phase(call, phase, at_ns), stopped_ns=None, waiting_until_ns=None))

    # -- time

    def _forget(self, now_ns: int) -> None:
        old = [
            c.id
            for c in self.tool_calls.values()
            if c.gone_ns is not None and c.end_ns is not None and now_ns - max(c.gone_ns, c.end_ns) > REMEMBER_NS
        ]
        for key in old:
            del self.tool_calls[key]
            self._accrued_ns.pop(key, None)
        if old:
            self._aliases = {alias: to for alias, to in self._aliases.items() if to in self.tool_calls}
            self._wrappers &= self._aliases.keys()
        self._left_behind &= self.sessions.keys()
        for decision in [d for d in self._decisions.values() if now_ns - d.at_ns > REMEMBER_NS]:
            del self._decisions[decision.id]

    def _watch_pressure(self, now_ns: int) -> None:
        pool = self.policy.memory.pool_bytes(self.host.memory_total_bytes)
        used = sum(c.used_bytes for c in self.tool_calls.values() if c.gone_ns is None)
        mark = self.policy.memory.pressure_above_ratio
        if self._pressure_since_ns is not None:
            mark = self.policy.memory.pressure_below_ratio
        if not pool or used < mark * pool:
            self._pressure_since_ns = None
        elif self._pressure_since_ns is None:
            self._pressure_since_ns = now_ns
