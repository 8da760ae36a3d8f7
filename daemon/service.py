"""The daemon put together: the composition root.

Owns the order in which parts start and stop, and what is done without when a part is missing. Parts are made here and
handed to each other; none looks another up. What a host lacks is said once, in `Host.lacks`, and the rest runs on.
Long for being the whole of it: one place from which every part can be found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from ..ebpf.errors import EbpfError
from ..ebpf.probes import Probes, Tuning
from ..ebpf.tool_memory import ToolMemory
from ..gpuctl import nvml
from ..gpuctl.hook import EngineHook
from ..policies.actions import Decision, EngineAction, Outcome
from ..policies.events import ConnectionOpened, Event, OutcomeObserved, PolicyApplied, TurnStarted
from ..policies.snapshot import Snapshot
from ..policies.state import State
from . import log, notify
from .alone import claim_base, claim_folder
from .enforce import fallback_budget
from .enforce.actuator import Actuator
from .enforce.fallback_budget import FallbackBudget
from .enforce.following import Following, release_on_request
from .enforce.guardian import release
from .enforce.guarding import Guarding
from .enforce.holds import Holds
from .enforce.targets import Budgets
from .engine_process import EngineConfig, EngineProcess
from .errors import CgroupError, JournalError
from .loop import Loop, Sink
from .observe.history import History
from .observe.joins import Joins
from .observe.journal import Journal, JournalReader
from .observe.kernel import KernelEvents
from .observe.metrics import MetricsServer
from .observe.recording import Recorder
from .observe.sources import HostSampler, SandboxSampler
from .observe.tallies import Tallies
from .policy import PolicyKeeper, Sources
from .rpc.policy_server import Effects, PolicyServer
from .rpc.sandbox_server import SandboxServer
from .rpc.server import claim_socket, serve
from .sandboxes.adoption import Adoption, Earlier
from .sandboxes.cgroups import CgroupDriver, sweep
from .sandboxes.keeper import SandboxKeeper
from .sandboxes.processes import boot_id
from .sandboxes.roles import RoleKeeper
from .sandboxes.tool_calls import ToolCallKeeper
from .sandboxes.witness import Witness
from .status import Host, Status

CANCEL_AGAIN_S = 1.0
RECALLED = 2000
"""Calls, and decisions, of earlier runs that are answered from memory; the journal has more."""


@dataclass(frozen=True, slots=True)
class Config:
    """What the command line says."""

    socket: Path
    journal: Path
    policy: tuple[str, ...] = ()
    """Built-in names, files and folders, the last over the others; none: the default policy."""
    metrics_listen: str = ""
    """HOST:PORT of the Prometheus endpoint; empty: none."""
    cgroup_base: str | None = None
    ebpf: bool = True
    tuning: Tuning = field(default_factory=Tuning)
    """Of the probes."""
    engine: EngineConfig | None = None
    """None: engines attach by themselves, or not at all."""


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT; answers the exit code. Raises DaemonError where it cannot start."""
    return asyncio.run(_run(config))


async def _run(config: Config) -> int:
    stop = asyncio.Event()
    running, began_at_a_terminal = asyncio.get_running_loop(), _has_terminal()
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, stop.set)
    running.add_signal_handler(signal.SIGHUP, lambda: None)  # what it would have us read is read at the start
    async with contextlib.AsyncExitStack() as parts:
        status = await start(config, parts)

        def on_hangup() -> None:
            """Read the policy again; but where it means that the terminal we run in has been closed, end with it."""
            if began_at_a_terminal and not _has_terminal():
                stop.set()
            else:
                status.policy.on_hangup()

        running.add_signal_handler(signal.SIGHUP, on_hangup)
        notify.ready(status.summary())
        host = status.host
        log.event("ready", socket=str(config.socket), probes=host.probe_backend, cgroups=host.cgroup_layout)
        await stop.wait()
        notify.stopping()
    return 0


def _has_terminal() -> bool:
    """Whether our session has a controlling terminal, see tty(4)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


async def start(config: Config, parts: contextlib.AsyncExitStack) -> Status:
    """Build the daemon; leaving `parts` takes it apart in reverse order.

    Raises DaemonError: one line with the remedy. Nothing of it is left then.
    """
    started_ns = now_ns()
    host = Host()
    policy = PolicyKeeper(Sources(config.policy), now_ns)
    driver = _find_cgroups(config, host, parts)
    claim_folder(config.journal.parent, driver.base if driver is not None else "none", parts)
    if driver is not None:
        claim_base(driver, parts)
    claim_socket(config.socket)
    journal = Journal.open(config.journal, boot_id=boot_id(), started_ns=started_ns)
    parts.callback(lambda: journal.close(now_ns()))
    driver = _prepare_cgroups(config, host, driver, parts)
    guarding = Guarding(config.journal, driver.base if driver else None)
    parts.callback(guarding.close)
    probes = _open_probes(config, host, parts)
    core = Core(config, policy, host, journal, driver, probes)
    parts.callback(core.let_go)
    core.take_up()
    if driver is not None:
        sweep(driver, {sandbox.path for sandbox in core.state.sandboxes.values()})
    status = core.status(started_ns)
    if config.metrics_listen:
        metrics = MetricsServer.start(config.metrics_listen, status.metrics)
        host.metrics_url = metrics.url
        parts.callback(metrics.close)
    await core.serve(status, parts)
    if probes is not None:
        running = asyncio.get_running_loop()
        running.add_reader(probes.fileno(), core.kernel.drain)
        parts.callback(running.remove_reader, probes.fileno())
    status.sources.append(HostSampler(core.loop.emit, now_ns, gpu=_gpu_memory(host, parts)))
    if driver is not None:
        status.sources.append(SandboxSampler(driver, lambda: core.loop.snapshot, core.loop.emit, now_ns))
    work = [core.loop.run(), *(source.run() for source in status.sources)]
    if core.polling is not None:
        work.append(core.polling.run())
    work += [
        core.adoption.look_again(),
        core.recorder.run(),
        policy.run(),
        guarding.run(),
        notify.watchdog(lambda: core.loop.turn_count, status.summary),
    ]
    if config.engine is not None:
        status.engine = EngineProcess(config.engine, str(config.socket), lambda url: notify.status(status.summary()))
        work.append(status.engine.run())
    for each in work:
        _task(each, parts)
    return status


class Core:
    """The parts between an event and what is done about it, made and joined. They run on one event loop.

    event -> State -> history, tallies, journal, tool calls, sandboxes, holds, joins (the sinks, in this order)
    decision -> the engine's hook, or the actuator
    """

    def __init__(
        self,
        config: Config,
        policy: PolicyKeeper,
        host: Host,
        journal: Journal,
        driver: CgroupDriver | None,
        probes: ToolMemory | None,
    ) -> None:
        self._config = config
        self._host = host
        self._journal = journal
        self.policy = policy
        self.state = State(policy.in_force.policy)
        sinks: list[Sink] = []
        self.loop = Loop(self.state, self._act, sinks, now_ns)
        emit = self.loop.emit
        policy.told_to(emit)
        self.history = History()
        self.tallies = Tallies()
        self.recorder = Recorder(journal, self.state, lambda: self.loop.snapshot)
        self.sandboxes = SandboxKeeper(driver, probes, self.state, emit, self.settle, now_ns)
        book, entry, find = self.sandboxes.book, self.sandboxes.entry, self.sandboxes.find_by_pid
        self.joins = Joins(self.state, lambda: self.kernel.drain(), emit, sandbox_of=find)  # noqa: PLW0108 - it is below
        self.roles = RoleKeeper(book, entry, probes, self.state, Witness(self.state, self.joins.owner_at), now_ns)
        self.kernel = KernelEvents(probes, self._from_kernel, now_ns, self.roles.sift, self.roles.look_again)
        self.hook = EngineHook(self._from_engine, now_ns, self.joins.who)
        self.calls = ToolCallKeeper(book, entry, driver, probes, self.state, emit, now_ns, find)
        self.holds = Holds(journal, driver)
        self.polling: FallbackBudget | None = None
        """Stands in for the probes."""
        budgets: Budgets
        if probes is not None:
            budgets, tier = probes, "kernel budget"
        else:
            budgets = self.polling = FallbackBudget(driver, self.holds, emit, now_ns=now_ns)
            tier = fallback_budget.TIER
        self.actuator = Actuator(self.holds, driver, budgets, budget_tier=tier, now_ns=now_ns)
        following = Following(
            self.actuator,
            self.polling,
            leaf=self.calls.leaf,
            disarm=self.sandboxes.disarm,
            own_cgroups=driver is not None,
        )
        sinks += [self.history, self.tallies, self.recorder, self.roles, self.calls, self.sandboxes, following]
        sinks += [self.joins, self._follow_policy]
        self.loop.every_turn(self._at_turn)
        self.loop.every_turn(self.recorder.turned)
        self.adoption = Adoption(
            self.sandboxes, self.calls, self.roles, driver, probes, self.state, emit, self.settle, now_ns
        )

    def take_up(self) -> None:
        """Remember what earlier runs of this boot left in the journal, and take up again what of it lives."""
        boot = boot_id()
        earlier = Earlier()
        try:
            with JournalReader(self._config.journal) as reader:
                sandboxes = reader.sandboxes_of_boot(boot)
                earlier = Earlier(
                    reader.registered(boot),
                    reader.open_calls(boot),
                    reader.merges(boot),
                    frozenset(sandbox.cgroup_id for sandbox in sandboxes),
                    reader.last_written_ns(boot),
                )
                self.history.recall(
                    reader.newest_calls(boot, RECALLED), reader.newest_decisions(boot, RECALLED), sandboxes
                )
        except JournalError as error:
            self._host.lacks.append(f"nothing is known of earlier runs: {error}")
        came = self.adoption.run(earlier)
        for gone in came.gone:
            self._journal.strike_sandbox(gone)
        for call in came.closed:
            self._journal.record_tool_call(call)
        self._journal.flush()
        self.history.recall(came.closed, (), ())
        self._host.adopted = came.summary()
        self._host.lacks += [f"not taken up again: {line}" for line in came.left.values()]

    def status(self, started_ns: int) -> Status:
        return Status(
            host=self._host,
            state=self.state,
            loop=self.loop,
            kernel=self.kernel,
            history=self.history,
            tallies=self.tallies,
            journal=self._journal,
            journal_path=self._config.journal,
            hook=self.hook,
            policy=self.policy,
            started_ns=started_ns,
        )

    async def serve(self, status: Status, parts: contextlib.AsyncExitStack) -> None:
        emit, holds, actuator = self.loop.emit, self.holds, self.actuator
        sandboxes = SandboxServer(self.sandboxes, self.calls, self.state, self.history, emit, self.settle, now_ns)
        effects = Effects(
            status.answer,
            lambda: release_on_request(holds, actuator, emit, now_ns),
            self.policy,
            self._config.journal,
            self.settle,
        )
        policy = PolicyServer(self.loop, self.history, effects)
        await serve(self._config.socket, sandboxes, policy, self.hook, parts)

    def settle(self) -> None:
        """Take in everything that waits and turn once: what the servers answer then is up to date."""
        self.kernel.drain()
        self.loop.turn()

    def let_go(self) -> None:
        """At the end: nobody stays stopped or throttled, and no cgroup of ours stays that is empty."""
        try:
            self.settle()
        finally:
            self.actuator.release_all(ending=True)
            self.calls.close()
            self.sandboxes.close()

    def _from_engine(self, event: Event) -> None:
        if isinstance(event, TurnStarted):
            self.kernel.drain()  # whatever was started for the turn before is known by now
        self.loop.emit(event)
        for told in self.roles.hear(event):  # now: what was asked for may be exec'd before the loop's next turn
            self.loop.emit(told)

    def _from_kernel(self, event: Event) -> None:
        if isinstance(event, ConnectionOpened):
            self.joins.opened(event)  # now: an engine may ask before the loop's next turn
        self.loop.emit(event)

    def _act(self, decision: Decision) -> Outcome | None:
        action = decision.action
        if isinstance(action, EngineAction):
            return self.hook.send(decision, action)
        self.kernel.read_usage(action.tool_call)
        return self.actuator.execute(decision)

    def _follow_policy(self, event: Event, state: State) -> None:
        """Calls get the budgets of a new policy; where it does nothing, what the one before held back is let go."""
        if isinstance(event, PolicyApplied):
            if not event.policy.enforce:
                release_on_request(self.holds, self.actuator, self.loop.emit, now_ns)
            self.calls.policy_applied()

    def _at_turn(self, snapshot: Snapshot) -> None:
        self.kernel.beat()
        self.calls.keep_up()
        for event in self.roles.at_turn():
            self.loop.emit(event)
        for outcome in self.actuator.expire(snapshot.now_ns):
            self.loop.emit(OutcomeObserved(outcome.at_ns, outcome))


# -- parts that a host may lack


def _find_cgroups(config: Config, host: Host, parts: contextlib.AsyncExitStack) -> CgroupDriver | None:
    """Which base is ours; nothing is touched. Without cgroups the daemon runs on, unless the base was asked for."""
    try:
        driver = CgroupDriver.open(base=config.cgroup_base)
    except CgroupError as error:
        _without_cgroups(config, host, error)
        return None
    parts.callback(driver.close)
    return driver


def _prepare_cgroups(
    config: Config, host: Host, driver: CgroupDriver | None, parts: contextlib.AsyncExitStack
) -> CgroupDriver | None:
    """Undo what an earlier run left, then make the base."""
    _release_earlier(config, driver)
    if driver is None:
        return None
    try:
        driver.prepare()
    except CgroupError as error:
        _without_cgroups(config, host, error)
        return None
    host.cgroup_layout = driver.layout.kind.value
    parts.callback(sweep, driver)
    return driver


def _release_earlier(config: Config, driver: CgroupDriver | None) -> None:
    left = release(config.journal, driver)
    if left.undone_count or left.found_count:
        log.event("released", undone=left.undone_count, found=left.found_count, why="left by an earlier run")


def _without_cgroups(config: Config, host: Host, error: CgroupError) -> None:
    if config.cgroup_base is not None:
        raise error
    host.cgroup_layout = f"none: {error}"
    host.lacks.append(
        f"no cgroups ({error}): a sandbox is its agent and the processes below it, nothing is throttled, and what "
        "leaves its agent's process tree is not seen"
    )


def _open_probes(config: Config, host: Host, parts: contextlib.AsyncExitStack) -> ToolMemory | None:
    try:
        if not config.ebpf:
            raise EbpfError("switched off by --no-ebpf")
        loaded = Probes.load(config.tuning)
    except EbpfError as error:
        host.probe_backend = f"none: {error}"
        host.lacks.append(
            f"no eBPF ({error}): tool calls are found by wrappers and hooks alone, those of hooks are not measured, "
            "and they are stopped at their budget from user space, some MiB late"
        )
        return None
    probes = ToolMemory(loaded)
    parts.callback(probes.close)
    host.probe_backend = "libbpf"
    host.lacks += [f"eBPF program {p.name}: {p.reason}" for p in loaded.report.programs if p.reason]
    return probes


def _gpu_memory(host: Host, parts: contextlib.AsyncExitStack) -> Callable[[], tuple[int, int] | None] | None:
    """A reading of all GPUs' memory, (total, used) bytes; None where there is no GPU."""
    opened = nvml.open_nvml()
    if isinstance(opened, nvml.NvmlAbsence):
        host.lacks.append(f"no GPU facts: {opened.reason}")
        return None
    parts.callback(opened.close)

    def memory() -> tuple[int, int] | None:
        gpus = opened.sample_memory()
        return (sum(g.total_bytes for g in gpus), sum(g.used_bytes for g in gpus)) if gpus else None

    return memory


def _task(work: Coroutine[None, None, None], parts: contextlib.AsyncExitStack) -> None:
    task = asyncio.create_task(work)

    async def end() -> None:
        while (
            not task.done()
        ):  # again, should something below have lost the first: a daemon that does not end is killed
            task.cancel()
            await asyncio.wait((task,), timeout=CANCEL_AGAIN_S)

    parts.push_async_callback(end)
