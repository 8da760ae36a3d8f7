"""The daemon put together: the composition root.

Owns the order in which parts start and stop, and what is done without when a part is missing. Parts are made here and
handed to each other; none looks another up. What a host lacks is said once, in `lacks`, and the rest runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket as sockets
import stat
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .. import __version__
from ..ebpf.errors import EbpfError
from ..ebpf.probes import Probes
from ..ebpf.tool_memory import ToolMemory
from ..gpuctl import nvml
from ..gpuctl.api.v1 import engine_pb2, engine_pb2_grpc
from ..gpuctl.hook import EngineHook
from ..policies.actions import Decision, EngineAction, Outcome, OutcomeStatus
from ..policies.events import (
    BudgetChanged,
    BudgetReached,
    Event,
    EventsLost,
    OutcomeObserved,
    ProcessesGone,
    SandboxRegistered,
    SandboxRemoved,
    ToolCallEnded,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
)
from ..policies.model import ToolCall, ToolCallId
from ..policies.policy import Policy
from ..policies.snapshot import Snapshot
from ..policies.state.state import State
from . import log, notify, policy_file
from .api.v1 import policy_pb2, policy_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from .enforce import fallback_budget
from .enforce.actuator import Actuator
from .enforce.fallback_budget import FallbackBudget
from .enforce.guardian import Guardian, release
from .enforce.holds import Holds
from .enforce.targets import Budgets
from .engine_process import EngineConfig, EngineProcess
from .errors import CgroupError, GuardianError, ListenError
from .loop import Loop
from .observe.history import History
from .observe.journal import Journal
from .observe.journal.hold import HoldCause, HoldKind
from .observe.metrics import MetricsFacts, MetricsServer
from .observe.samples import samples_of
from .observe.sources import HostSampler, SandboxSampler, Source
from .observe.tallies import Tallies
from .rpc.policy_server import Effects, PolicyServer
from .rpc.sandbox_server import SandboxServer
from .sandboxes.cgroups import CgroupDriver
from .sandboxes.keeper import SandboxKeeper

SOCKET_MODE = 0o660
HOOK_MODULES = "equipoise.integrations."
"""In the command line of every hook that our integrations install."""
LONGEST_SOCKET = 107
"""Of sockaddr_un's 108 bytes, see unix(7)."""
GUARDIAN_CHECK_S = 1.0
SAMPLE_S = 0.5
"""Between two points of the journal's timeline, and two writes of what waits."""


@dataclass(frozen=True, slots=True)
class Config:
    """What the command line says."""

    socket: Path
    journal: Path
    policy: Path | None = None
    metrics_listen: str = ""
    """HOST:PORT of the Prometheus endpoint; empty: none."""
    cgroup_base: str | None = None
    ebpf: bool = True
    engine: EngineConfig | None = None
    """None: engines attach by themselves, or not at all."""


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT; answers the exit code. Raises DaemonError where it cannot start."""
    return asyncio.run(_run(config))


async def _run(config: Config) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as parts:
        service = await Service.start(config, parts)
        notify.ready(service.summary())
        log.event("ready", socket=str(config.socket), probes=service.probe_backend, cgroups=service.cgroup_layout)
        await stop.wait()
        notify.stopping()
    return 0


class Service:
    """The running daemon. `start` builds it; leaving the exit stack it was given takes it apart in reverse order."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config = config
        self.started_ns = now_ns()
        self.lacks: list[str] = []
        """What this host does not offer, one line each."""
        self.cgroup_layout = "none"
        self.probe_backend = "none"
        self.metrics_url = ""
        self.tallies = Tallies()
        self.sources: list[Source] = []
        self.state = State(policy)
        self.history = History()
        self.journal: Journal
        self.driver: CgroupDriver | None = None
        self.probes: ToolMemory | None = None
        self.polling: FallbackBudget | None = None
        """Stands in for the probes."""
        self.guardian: Guardian
        self._own_hooks: set[ToolCallId] = set()
        self.loop: Loop
        self.hook: EngineHook
        self.holds: Holds
        self.actuator: Actuator
        self.keeper: SandboxKeeper
        self.engine: EngineProcess | None = None

    @classmethod
    async def start(cls, config: Config, parts: contextlib.AsyncExitStack) -> Service:
        """Raises DaemonError: one line with the remedy. Nothing of it is left then."""
        policy = policy_file.load(config.policy or policy_file.BUILTIN)
        service = cls(config, policy)
        service._claim_socket()
        service.journal = Journal.open(config.journal, boot_id=boot_id(), started_ns=service.started_ns)
        parts.callback(lambda: service.journal.close(now_ns()))
        service._open_cgroups(parts)
        service._start_guardian()
        parts.callback(service._end_guardian)
        service._open_probes(parts)
        service._compose(parts)
        await service._serve(parts)
        service._begin_sampling(parts)
        if config.engine is not None:
            service._begin_engine(config.engine, parts)
        return service

    # -- parts, in the order in which they start

    def _claim_socket(self) -> None:
        """Make way for our socket: a dead daemon's file goes, a living daemon's is an error."""
        path = self.config.socket
        if len(os.fsencode(path)) > LONGEST_SOCKET:
            raise ListenError(
                f"{path}: too long for a socket, at most {LONGEST_SOCKET} bytes: give --socket another path"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise ListenError(f"{path.parent}: {error.strerror}: give --state-dir a folder that is yours") from error
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror}: give --socket a path that is yours") from error
        if not stat.S_ISSOCK(mode):
            raise ListenError(f"{path}: is there and is no socket: remove it, or give --socket another path")
        with sockets.socket(sockets.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except OSError as error:
                reason = error.strerror or error
                raise ListenError(f"{path}: {reason}: remove it, or give --socket another path") from error
        raise ListenError(f"{path}: another daemon listens there: stop it, or give --socket another path")

    def _open_cgroups(self, parts: contextlib.AsyncExitStack) -> None:
        """Undo what an earlier run left, then make the base. Without cgroups the daemon runs on, unless the base was
        asked for by name.
        """
        try:
            driver = CgroupDriver.open(base=self.config.cgroup_base)
        except CgroupError as error:
            self._without_cgroups(error)
            self._release_earlier(None)
            return
        self._release_earlier(driver)
        try:
            sweep(driver)
            driver.prepare()
        except CgroupError as error:
            driver.close()
            self._without_cgroups(error)
            return
        self.driver = driver
        self.cgroup_layout = driver.layout.kind.value
        parts.callback(driver.close)
        parts.callback(sweep, driver)

    def _release_earlier(self, driver: CgroupDriver | None) -> None:
        left = release(self.config.journal, driver)
        if left.undone_count or left.found_count:
            log.event("released", undone=left.undone_count, found=left.found_count, why="left by an earlier run")

    def _without_cgroups(self, error: CgroupError) -> None:
        if self.config.cgroup_base is not None:
            raise error
        self.cgroup_layout = f"none: {error}"
        self.lacks.append(
            f"no cgroups ({error}): a sandbox is its agent and the processes below it, nothing is throttled, and what "
            "leaves its agent's process tree is not seen"
        )

    def _start_guardian(self) -> None:
        self.guardian = Guardian.start(self.config.journal, base=self.driver.base if self.driver else None)

    def _open_probes(self, parts: contextlib.AsyncExitStack) -> None:
        if not self.config.ebpf:
            self._without_probes("switched off by --no-ebpf")
            return
        try:
            loaded = Probes.load()
        except EbpfError as error:
            self._without_probes(str(error))
            return
        self.probes = ToolMemory(loaded)
        parts.callback(self.probes.close)
        self.probe_backend = "libbpf"
        self.lacks += [f"eBPF program {p.name}: {p.reason}" for p in loaded.report.programs if p.reason]

    def _without_probes(self, reason: str) -> None:
        self.probe_backend = f"none: {reason}"
        self.lacks.append(
            f"no eBPF ({reason}): tool calls are found by wrappers and hooks alone, those of hooks are not measured, "
            "and they are stopped at their budget from user space, some MiB late"
        )

    def _compose(self, parts: contextlib.AsyncExitStack) -> None:
        self.holds = Holds(self.journal, self.driver)
        self.loop = Loop(self.state, self._act, (self.history, self.tallies, self._to_journal, self._on_event), now_ns)
        self.keeper = SandboxKeeper(self.driver, self.probes, self.state, self.loop.emit, self._settle, now_ns)
        self.hook = EngineHook(self.loop.emit, now_ns)
        budgets: Budgets
        if self.probes is not None:
            budgets, tier = self.probes, "kernel budget"
        else:
            budgets = self.polling = FallbackBudget(self.driver, self.holds, self.loop.emit, now_ns=now_ns)
            tier = fallback_budget.TIER
        self.actuator = Actuator(self.holds, self.driver, budgets, budget_tier=tier, now_ns=now_ns)
        parts.callback(self._let_go)
        self.loop.every_turn(self._at_turn)

    async def _serve(self, parts: contextlib.AsyncExitStack) -> None:
        if self.config.metrics_listen:
            metrics = MetricsServer.start(self.config.metrics_listen, self._metrics_facts)
            self.metrics_url = metrics.url
            parts.callback(metrics.close)
        server = grpc.aio.server()
        sandboxes = SandboxServer(self.keeper, self.state, self.history, self.loop.emit, self._settle, now_ns)
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(sandboxes, server)
        effects = Effects(self.status, self._release)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServer(self.loop, self.history, effects), server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self.hook, server)
        answering = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs leave aio out
        health_pb2_grpc.add_HealthServicer_to_server(answering, server)
        names = [
            module.DESCRIPTOR.services_by_name[name].full_name
            for module, name in (
                (sandbox_pb2, "SandboxService"),
                (policy_pb2, "PolicyService"),
                (engine_pb2, "EngineService"),
                (health_pb2, "Health"),
            )
        ]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        for name in ("", *names):
            await answering.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            server.add_insecure_port(f"unix:{self.config.socket}")
        except RuntimeError as error:
            raise ListenError(f"{self.config.socket}: cannot listen there: {error}") from error
        await server.start()
        self.config.socket.chmod(SOCKET_MODE)
        parts.push_async_callback(self._stop_serving, server)

    async def _stop_serving(self, server: grpc.aio.Server) -> None:
        await server.stop(grace=0.5)
        self.config.socket.unlink(missing_ok=True)

    def _begin_sampling(self, parts: contextlib.AsyncExitStack) -> None:
        running = asyncio.get_running_loop()
        if self.probes is not None:
            running.add_reader(self.probes.fileno(), self._drain)
            parts.callback(running.remove_reader, self.probes.fileno())
        self._task(self.loop.run(), parts)
        self.sources = [HostSampler(self.loop.emit, now_ns, gpu=self._gpu_memory(parts))]
        if self.driver is not None:
            self.sources.append(SandboxSampler(self.driver, lambda: self.loop.snapshot, self.loop.emit, now_ns))
        for source in self.sources:
            self._task(source.run(), parts)
        if self.polling is not None:
            self._task(self.polling.run(), parts)
        self._task(self._keep_journal(), parts)
        self._task(self._keep_guardian(), parts)
        self._task(notify.watchdog(lambda: self.loop.turn_count, self.summary), parts)

    def _gpu_memory(self, parts: contextlib.AsyncExitStack) -> Callable[[], tuple[int, int] | None] | None:
        """A reading of all GPUs' memory, (total, used) bytes; None where there is no GPU."""
        opened = nvml.open_nvml()
        if isinstance(opened, nvml.NvmlAbsence):
            self.lacks.append(f"no GPU facts: {opened.reason}")
            return None
        parts.callback(opened.close)

        def memory() -> tuple[int, int] | None:
            gpus = opened.sample_memory()
            return (sum(g.total_bytes for g in gpus), sum(g.used_bytes for g in gpus)) if gpus else None

        return memory

    def _begin_engine(self, config: EngineConfig, parts: contextlib.AsyncExitStack) -> None:
        self.engine = EngineProcess(config, str(self.config.socket), lambda url: notify.status(self.summary()))
        self._task(self.engine.run(), parts)

    @staticmethod
    def _task(work: Coroutine[None, None, None], parts: contextlib.AsyncExitStack) -> None:
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        parts.push_async_callback(end)

    # -- at work

    def _act(self, decision: Decision) -> Outcome | None:
        action = decision.action
        if isinstance(action, EngineAction):
            return self.hook.send(decision, action)
        self._read_usage(action.tool_call)
        return self.actuator.execute(decision)

    def _read_usage(self, tool_call: ToolCallId) -> None:
        """What a call uses before something is done to it: a stopped one may have grown until all of it stood still."""
        usage = self.probes.usage(tool_call) if self.probes is not None else None
        if usage is not None:
            self.loop.emit(ToolCallMemoryStepped(now_ns(), tool_call, usage.used_bytes, usage.peak_bytes))

    def _on_event(self, event: Event, state: State) -> None:
        """Sink: sandboxes, leaves and holds follow what happens."""
        match event:
            case SandboxRegistered(sandbox=registered) if self.driver is not None:
                if not self.actuator.arm(registered.path):
                    self.keeper.disarm(registered.cgroup_id)
            case SandboxRemoved(path=path):
                self.actuator.disarm(path)
            case ToolCallMerged():
                self.actuator.merge(event.id, event.into)
            case BudgetReached():
                self.actuator.stopped_at_budget(event)
            case BudgetChanged() if self.polling is not None:
                with contextlib.suppress(LookupError):  # it has ended meanwhile
                    self.polling.set_budget(event.id, soft_bytes=event.soft_bytes, hard_bytes=event.hard_bytes)
            case _:
                pass
        self.keeper(event, state)
        match event:
            case ToolCallStarted(id=tool_call) if call := state.tool_calls.get(tool_call):
                sandbox = state.sandboxes.get(call.sandbox)
                self.actuator.bind(
                    call.id,
                    leaf=self.keeper.leaf(call.id),
                    pid=call.pid,
                    agent_pid=sandbox.agent_pid if sandbox else None,
                    hard_bytes=call.hard_bytes,
                )
                if self.polling is not None and call.pid is not None:
                    self._poll(call)
            case ProcessesGone(id=tool_call) if state.resolve(tool_call) == tool_call:
                self.actuator.unbind(tool_call)
                if self.polling is not None:
                    self.polling.unfollow(tool_call)
            case _:
                pass

    def _poll(self, call: ToolCall) -> None:
        """Without probes: watch the call's memory from user space."""
        assert self.polling is not None
        self.polling.follow(
            call.id,
            leaf=self.keeper.leaf(call.id),
            pid=call.pid,
            soft_bytes=call.soft_bytes,
            hard_bytes=call.hard_bytes,
        )

    def _drain(self) -> None:
        """Take in what the kernel reports."""
        if self.probes is None:
            return
        events = self.probes.drain()
        if any(isinstance(event, EventsLost) for event in events):
            events += self.probes.resync()
        for event in events:
            if not self._is_own_hook(event):
                self.loop.emit(event)

    def _is_own_hook(self, event: Event) -> bool:
        """Whether it is about a hook of ours that an agent ran: that is no tool call, and must not be taken for the
        one it announces."""
        call = getattr(event, "id", None)
        if isinstance(event, ToolCallStarted) and HOOK_MODULES in event.command:
            self._own_hooks.add(event.id)
        if call not in self._own_hooks:
            return False
        if isinstance(event, ProcessesGone):
            self._own_hooks.discard(event.id)
        return True

    def _settle(self) -> None:
        """Take in everything that waits and turn once: what the servers answer then is up to date."""
        self._drain()
        self.loop.turn()

    def _at_turn(self, snapshot: Snapshot) -> None:
        if self.probes is not None:
            self.probes.beat()
            self._drain()  # memory steps wake nobody by themselves
        for outcome in self.actuator.expire(snapshot.now_ns):
            self.loop.emit(OutcomeObserved(outcome.at_ns, outcome))

    # -- the journal

    def _to_journal(self, event: Event, state: State) -> None:
        self.journal.record(event)
        match event:
            case ToolCallStarted(id=tool_call) | ToolCallEnded(id=tool_call) | ProcessesGone(id=tool_call):
                if call := state.tool_calls.get(state.resolve(tool_call)):
                    self.journal.record_tool_call(call)
            case _:
                pass

    async def _keep_journal(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.journal.record_samples(samples_of(self.loop.snapshot))
            self.journal.flush()

    async def _keep_guardian(self) -> None:
        while True:
            await asyncio.sleep(GUARDIAN_CHECK_S)
            if self.guardian.alive():
                continue
            log.warning("guardian_died", pid=self.guardian.pid)
            died = self.guardian
            try:
                self._start_guardian()
            except GuardianError as error:
                log.warning("guardian_not_replaced", error=str(error))
                continue
            died.close()

    def _end_guardian(self) -> None:
        self.guardian.close()

    # -- said to the outside

    def status(self) -> policy_pb2.GetStatusResponse:
        losses = self.probes.losses() if self.probes is not None else None
        return policy_pb2.GetStatusResponse(
            version=__version__,
            probe_backend=self.probe_backend,
            cgroup_layout=self.cgroup_layout,
            policy_name=self.state.policy.name,
            engine_url=(self.engine.url if self.engine else None) or "",
            metrics_url=self.metrics_url,
            ring_drop_count=losses.events_count if losses else 0,
            late_event_count=self.state.late_count + self.loop.dropped_count,
            failed_action_count=self.history.failed_action_count,
            lacks=self.lacks + ([f"engine: {self.engine.failure}"] if self.engine and self.engine.failure else []),
            started_ns=self.started_ns,
            journal_path=str(self.config.journal),
        )

    def _metrics_facts(self) -> MetricsFacts:
        losses = self.probes.losses() if self.probes is not None else None
        return MetricsFacts(
            snapshot=self.loop.snapshot,
            counts=self.tallies.read(),
            version=__version__,
            ring_drop_count=losses.events_count if losses else 0,
            late_event_count=self.state.late_count + self.loop.dropped_count,
            failed_action_count=self.history.failed_action_count,
            source_failure_count=sum(source.failure_count for source in self.sources),
            journal_lost_rows_count=self.journal.lost_rows_count,
        )

    def summary(self) -> str:
        """One line for systemctl status."""
        engine = self.engine.url if self.engine and self.engine.url else f"{len(self.hook.attached)} engines"
        return (
            f"policy {self.state.policy.name}; {len(self.state.sandboxes)} sandboxes; engine {engine}; probes "
            f"{self.probe_backend.split(':', 1)[0]}; cgroups {self.cgroup_layout}"
        )

    def _release(self) -> list[str]:
        held = [hold for hold in self.holds.all() if hold.kind is not HoldKind.ARMED]
        failed = self.actuator.release_all()
        at_ns = now_ns()
        for hold in held:
            if hold.cause is HoldCause.BUDGET and hold.tool_call is not None:
                self.loop.emit(BudgetChanged(at_ns, hold.tool_call, 0, 0))
            elif hold.decision is not None:
                outcome = Outcome(hold.decision, OutcomeStatus.EXPIRED, at_ns, hold.kind.value, "released on request")
                self.loop.emit(OutcomeObserved(at_ns, outcome))
        return [f"{hold.kind.value} on {hold.target}" for hold in held] + (
            [f"{failed} of them could not be undone: see the log"] if failed else []
        )

    def _let_go(self) -> None:
        """At the end: nobody stays stopped or throttled, and no cgroup of ours stays that is empty."""
        try:
            self._settle()
        finally:
            self.actuator.release_all(ending=True)
            self.keeper.close()


def sweep(driver: CgroupDriver) -> None:
    """Remove what is empty below our base, and the base: sandboxes that an earlier run left, tenants without any."""
    for path in reversed(driver.below(driver.base)):
        driver.remove(path, patience_s=0.0)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
