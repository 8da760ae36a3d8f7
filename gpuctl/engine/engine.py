"""The step loop: one thread that applies what arrived, asks the scheduler for a plan, and has it carried out.

Owns: the thread, how a turn ends, and what becomes of all turns when the loop does. Everything that touches the
scheduler, the books or llama.cpp happens on this thread at a step border. Must not: choose (scheduler.py) or speak HTTP
or gRPC (openai/http.py, ../client.py); both reach it through `submit`, `cancel`, `direct` and `listen`, safe from any
thread.

Longer than most: more than half of it puts the parts together and is the doors from other threads, short but many; what
a step does is in the parts (stepper.py, intake.py, tiers/mover.py, peer/).
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...policies.accounting import Gamma, SessionCost, TurnCost
from ...policies.model import KvTier
from ..directives import DIRECTIVES, Directive, Outcome, OutcomeStatus
from ..energy import EnergyMeter
from ..reports import (
    EngineFacts,
    Listener,
    Occupancy,
    TurnPreempted,
    TurnStarted,
)
from .compute.conversation import joined
from .compute.kv_image import KvFormat
from .compute.language_model import LanguageModel
from .compute.runner import Runner
from .compute.tool_calls import asked_for, tool_calls_in
from .errors import FAILED, STOPPING, EngineError, RequestError
from .intake import Intake, Submitted
from .live import LiveTurn
from .parts import EngineParts, Limits
from .peer.handovers import Handovers
from .reporter import OCCUPANCY_PERIOD_NS, Reporter, turn_ended
from .schedule.cost_figures import CostFigures
from .schedule.directing import Director
from .schedule.ledger import Ledger
from .schedule.plan import StepPlan
from .schedule.scheduler import Scheduler, SchedulerConfig
from .schedule.sequence import FinishReason, SessionId, Sink, TenantId, TurnId, TurnRequest, finished
from .schedule.session_index import SessionIndex
from .stepper import Stepper
from .tiers.mover import Mover
from .tiers.swapper import Swapper
from .tiers.table import OpenTier, in_memory
from .totals import Totals
from .turn_cost import Accounts, AccountsNow

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0
_ENDED_CHECK_S = 0.2


@dataclass(frozen=True, slots=True)
class EngineConfig:
    kv_tokens: int
    """Device tokens over all sessions."""
    default_max_tokens: int = 512
    """Output limit of a turn that names none."""
    interrupts: bool = True
    """A turn that wishes a time to first token may interrupt a long prefill inside a step."""
    max_sessions: int = 4096
    """Conversations remembered; one more makes the engine forget the idle one unused longest, unnamed ones first."""
    keep_anonymous: bool = True
    """Turns that name no session leave one that a prompt continuing its text finds again; else they leave nothing."""
    max_queued_turns: int = 256
    """Turns waiting for admission; one more is refused with 429."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True, slots=True)
class _Cancel:
    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class _Direct:
    directive: Directive


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], None]


_Arrival = Submitted | _Cancel | _Direct | _Call
Books = tuple[Occupancy, dict[TenantId, float], AccountsNow]


class Engine:
    def __init__(
        self,
        model: LanguageModel,
        runner: Runner,
        config: EngineConfig,
        tiers: Sequence[OpenTier] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        gamma: Gamma | None = None,
        meter: EnergyMeter | None = None,
    ) -> None:
        """`tiers`: those below the device, from the nearest down; None: host RAM alone, of the usual size.

        `clock` answers CLOCK_MONOTONIC nanoseconds; tests give their own. `gamma` and `meter` as in turn_cost.py.
        """
        self._clock = clock
        self._wake_ns: int | None = None
        self._stuck = False
        self.model = model
        self.config = config
        self.listen_addresses: tuple[str, ...] = ()
        """Where it is served, for its facts; whoever serves it says so before a daemon is told."""
        self.engine_id = f"embedded-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.totals = Totals()
        self._runner = runner
        tiers = in_memory() if tiers is None else tiers
        self._ledger = Ledger(
            device_capacity_tokens=min(config.kv_tokens, runner.physical_tokens),
            slot_count=runner.slot_count,
            bytes_per_token=runner.bytes_per_token,
            lower=[(each.tier, each.capacity_bytes) for each in tiers],
        )
        self._scheduler = Scheduler(config.scheduler, self._ledger, physical_tokens=runner.physical_tokens)
        self._director = Director(self._scheduler)
        self._swapper = Swapper(runner, tiers)
        self._accounts = Accounts(clock, self.totals, gamma, meter)
        self._reporter = Reporter(self._scheduler, self.totals, clock)
        self._mover = Mover(runner, self._swapper, self._scheduler, self._reporter, self.totals)
        self._by_text = SessionIndex()
        self._live: dict[SessionId, LiveTurn] = {}
        parts = EngineParts(
            engine_id=self.engine_id,
            model=model,
            runner=runner,
            scheduler=self._scheduler,
            swapper=self._swapper,
            mover=self._mover,
            reporter=self._reporter,
            accounts=self._accounts,
            totals=self.totals,
            by_text=self._by_text,
            live=self._live,
            limits=Limits(
                self.longest_turn_tokens, config.max_queued_turns, config.max_sessions, config.default_max_tokens
            ),
            finish=self._finish,
            cancel=self._cancel,
            begin_next=self._begin_next,
            clock=clock,
        )
        self.handovers = Handovers(parts)
        self._intake = Intake(parts, self._busy, keep_anonymous=config.keep_anonymous)
        self._stepper = Stepper(parts)
        self._inbox: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._turn_numbers = itertools.count(1)
        self._at_border: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._ended = False
        self.failed = False
        """The loop has ended by a fault of ours: every turn is refused, and only a new process can serve again."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the loop at the next step border; turns under way end with an error that says so. Safe to call twice."""
        self._stopping.set()
        self._inbox.put(_Call(lambda: None))
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: TurnRequest, sink: Sink) -> TurnId:
        """Queue a turn. `sink` gets TurnAccepted or TurnRefused first, then its text, then TurnFinished."""
        # Unique on the host: a turn keeps its id when it is handed over.
        turn_id = TurnId(f"{self.engine_id}-turn-{next(self._turn_numbers)}")
        self._inbox.put(Submitted(turn_id, request, sink, self._clock()))
        if request.slo.ttft_ns is not None and self.config.interrupts:
            self._stepper.hurry()
        if self._ended:
            self._refuse_arrivals()  # the loop may have looked for the last time before this one came
        return turn_id

    def cancel(self, turn_id: TurnId) -> None:
        """End the turn at the next step border. Safe for a turn that has ended."""
        self._inbox.put(_Cancel(turn_id))

    def direct(self, directive: Directive) -> None:
        """Apply a directive at the next step border; its outcomes are reported to the listeners."""
        self._inbox.put(_Direct(directive))

    def release_holds(self) -> None:
        """The daemon is gone: every hold it made ends."""
        self._inbox.put(_Call(self._scheduler.release_holds))

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` on the engine's thread with every report; it must not block. Returns how to stop it."""
        self._inbox.put(_Call(lambda: self._reporter.add(listener)))
        return lambda: self._inbox.put(_Call(lambda: self._reporter.remove(listener)))

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the engine's thread at the next step border (tests, metrics)."""
        self._inbox.put(_Call(function))

    def at_border(self, function: Callable[[], None]) -> None:
        """Call it on the engine's thread when what a step has brought is complete: before the next one, or a wait."""
        self._at_border.append(function)

    def reaches_border(self) -> bool:
        """Whether this is the engine's thread and comes by the next border."""
        return threading.current_thread() is self._thread and not self._ended

    def books_now(self, timeout_s: float = 30.0) -> Books:
        """The books, the tenants' service counters and what turns have cost, at the next step border.

        Raises EngineError where the loop has ended or does not answer in time.
        """
        answer: queue.SimpleQueue[Books] = queue.SimpleQueue()
        service, accounts = self._scheduler.service, self._accounts
        self.call(lambda: answer.put((self._reporter.occupancy(), service.counters(), accounts.now())))
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                return answer.get(timeout=_ENDED_CHECK_S)
            except queue.Empty:
                if self._ended:  # who waits here must not keep the process from ending
                    raise EngineError(FAILED if self.failed else STOPPING) from None
        raise EngineError(f"the engine did not reach a step border within {timeout_s:g} s")

    def facts(self) -> EngineFacts:
        return EngineFacts(
            engine_id=self.engine_id,
            kind="embedded",
            model=self.model.name,
            pid=os.getpid(),
            bytes_per_token=self._ledger.bytes_per_token,
            device_capacity_tokens=self._ledger.device_capacity_tokens,
            host_capacity_bytes=self._ledger.capacity_bytes(KvTier.HOST),
            disk_capacity_bytes=self._ledger.capacity_bytes(KvTier.DISK),
            cost=self.cost,
            directives=DIRECTIVES,
            listen_addresses=self.listen_addresses,
        )

    @property
    def kv_format(self) -> KvFormat:
        """The form of KV this engine saves and takes."""
        return self._runner.kv_format

    @property
    def cost(self) -> CostFigures:
        """What computing and copying cost here, as reported to the daemon and used for SLOs."""
        return self._reporter.cost

    @cost.setter
    def cost(self, figures: CostFigures) -> None:
        self._reporter.cost = self._scheduler.cost = self._accounts.cost = figures

    @property
    def longest_turn_tokens(self) -> int:
        """Most tokens of one conversation, prompt and output together."""
        return min(self._runner.slot_tokens, self.config.kv_tokens)

    # The loop

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self.cycle(wait=True)
            self._end_turns()
        except Exception:  # one nobody foresaw: those that can be served on with are caught where they arise
            _log.critical("engine_failed turns=%d", len(self._live), exc_info=True)
            self.failed = True
            self._abandon_turns()
        self._ended = True
        self._border()
        self._refuse_arrivals()
        self._swapper.close()

    def _end_turns(self) -> None:
        self._intake.refuse_waiting(self._refusal)  # before the turns they wait for end
        self.handovers.close()
        for live in list(self._live.values()):
            self._finish(live, FinishReason.ERROR, STOPPING)

    def _abandon_turns(self) -> None:
        """After a fault of ours: the books may be wrong, so touch none, but let nobody wait for an answer for ever."""
        self._intake.refuse_waiting(self._refusal)
        now_ns = self._clock()
        for live in self._live.values():
            cost = (TurnCost(), SessionCost())
            live.sink(
                finished(live.turn, FinishReason.ERROR, *cost, now_ns=now_ns, engine_id=self.engine_id, error=FAILED)
            )

    @property
    def _refusal(self) -> RequestError:
        return RequestError(FAILED if self.failed else STOPPING, status=503, kind="server_error")

    def _refuse_arrivals(self) -> None:
        """Refuse every turn that has arrived. From any thread, once the loop has ended."""
        while True:
            try:
                arrival = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(arrival, Submitted):
                arrival.refuse(self._refusal)

    def cycle(self, *, wait: bool = False) -> bool:
        """One step border and one step: apply what arrived, plan, carry out. Whether anything was done.

        The engine's thread calls it for ever, waiting for arrivals where there is nothing to compute; a test that never
        calls `start` may call it instead.
        """
        self._take_arrivals(wait)
        self._mover.note_failed_writes()
        now_ns = self._clock()
        for outcome in self._director.retry_deferred(now_ns):
            self._reporter.settle(outcome)
        plan = self._scheduler.plan(now_ns)
        self._border()
        self._wake_ns = min((at for at in (plan.wake_ns, self._director.next_deadline_ns()) if at), default=None)
        self._carry_out(plan)
        self._stuck = not plan.slices and not plan.moves and self._scheduler.busy()
        if not self.handovers.in_doubt:
            self._reporter.report_occupancy()
        return bool(plan.slices or plan.moves)

    def _take_arrivals(self, wait: bool) -> None:
        """Handle all that has arrived; where there is nothing to compute and `wait` is set, block for the next one."""
        self._stepper.arrivals_seen()
        idle = self._stuck or not self._scheduler.busy()
        if not idle and self._inbox.empty():
            return
        self._border()  # neither a wait nor the work on arrivals holds up what is there already
        if wait and idle:
            # Stuck: turns wait and none can run until something ends by itself (a pin, a hold); do not spin meanwhile.
            wait_s = 0.02 if self._stuck else _IDLE_WAIT_S
            if self._wake_ns is not None:
                wait_s = min(wait_s, max(0.0, (self._wake_ns - self._clock()) / 1e9))
            if self._reporter.occupancy_due:
                wait_s = min(wait_s, OCCUPANCY_PERIOD_NS / 1e9)
            try:
                self._handle(self._inbox.get(timeout=wait_s))
            except queue.Empty:
                return
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _border(self) -> None:
        for function in self._at_border:
            function()

    def _handle(self, arrival: _Arrival) -> None:
        match arrival:
            case Submitted():
                self._intake.take(arrival)
            case _Cancel(turn_id):
                self._cancel(turn_id)
            case _Direct(directive):
                self._direct(directive)
            case _Call(function):
                function()

    # Turns

    def _busy(self, session_id: SessionId) -> bool:
        """Whether a turn of the session is under way, here or in another engine."""
        return session_id in self._live or self.handovers.away(session_id)

    def _begin_next(self, session_id: SessionId) -> None:
        self._intake.begin_next(session_id)

    def _cancel(self, turn_id: TurnId) -> None:
        for live in self._live.values():
            if live.turn.id == turn_id:
                self._finish(live, FinishReason.CANCELLED)
                return
        if not self._intake.cancel(turn_id):
            self.handovers.cancel(turn_id)

    def _finish(self, live: LiveTurn, reason: FinishReason, error: str | None = None) -> None:
        turn, session = live.turn, self._scheduler.sessions[live.turn.session_id]
        now_ns = self._clock()
        live.flush()
        calls = tool_calls_in(live.text)[1] if live.request.may_call_tools and reason is FinishReason.STOP else []
        if calls:
            reason = FinishReason.TOOL_CALLS
        session.text = joined(live.request.prompt, live.output)
        live.sampler.close()
        del self._live[session.id]
        completed = reason is not FinishReason.CANCELLED and reason is not FinishReason.ERROR
        self._scheduler.finish(session.id, now_ns, completed=completed)
        if session.anonymous and session.id in self._scheduler.sessions:
            self._by_text.add(session)
        end = finished(
            turn,
            reason,
            self._accounts.close(turn, session, now_ns),
            session.cost,
            now_ns=now_ns,
            engine_id=self.engine_id,
            awaits_tool=live.request.awaits_tool or reason is FinishReason.TOOL_CALLS,
            error=error,
        )
        # The daemon first: what it decides for the pause should not come after the client's next request.
        told = live.request.awaits_tool and completed
        shown = FinishReason.TOOL_CALLS if told else reason
        self._reporter.report(turn_ended(turn, end, shown, asked_for(turn.id, calls)))
        live.sink(end)
        self._reporter.occupancy_due = True
        self._intake.begin_next(session.id)

    # Carrying out a plan

    def _carry_out(self, plan: StepPlan) -> None:
        failed: set[SessionId] = set()
        for session_id in plan.forgotten:
            self._by_text.remove(session_id)
        for move in plan.moves:
            if not self._mover.carry_out(move):
                failed.add(move.session_id)
        for session_id in plan.admitted:
            self._report_started(session_id)
        for preempted in plan.preempted:
            self.totals.preempted_count += 1
            session = self._scheduler.sessions.get(preempted.session_id)
            if session is not None:  # else forgotten at this very step border
                turn_id = session.turn.id if session.turn else TurnId("")
                to_tier = preempted.to_tier.told_as
                self._reporter.report(
                    TurnPreempted(session.id, session.tenant_id, turn_id, to_tier, preempted.directive_id)
                )
            if preempted.directive_id:
                self._reporter.settle(Outcome(preempted.directive_id, OutcomeStatus.COMPLETED))
        slices = [item for item in plan.slices if item.session_id not in failed]
        if slices:
            self._stepper.step(slices)
        else:
            self._accounts.pause()

    # Directives and reports

    def _direct(self, directive: Directive) -> None:
        known = self._reporter.outcomes.of(directive.directive_id)
        self._reporter.settle(known or self._director.apply(directive, self._clock()))

    def _report_started(self, session_id: SessionId) -> None:
        live = self._live.get(session_id)
        if live is None:
            return
        turn = live.turn
        self.totals.cached_tokens += turn.cached_tokens
        self._reporter.occupancy_due = True
        self._reporter.report(
            TurnStarted(
                session_id=session_id,
                tenant_id=turn.tenant_id,
                turn_id=turn.id,
                prompt_tokens=turn.prompt_tokens,
                cached_tokens=turn.cached_tokens,
                peer_port=live.request.peer_port,
                peer_address=live.request.peer_address,
            )
        )
