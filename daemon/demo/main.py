"""Runs the demo from start to report.

Owns the order: prepare, daemon, agents, watch, report, and the end of everything, whatever happened in between.
Must not: decide what is drawn or printed (report, tables, timeline, live).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from rich.console import Console
from rich.markup import escape

from ..api.v1 import policy_pb2, policy_pb2_grpc
from ..rpc.client import SOCKET_NAME
from . import processes, report, tables, timeline
from .live import View, view_for
from .record import Sample, sample_of
from .scenario import AGENTS, Agent, Layout, prepare

READY_LIMIT_S = 180.0
"""The first start on a machine prepares the model (12 s where it was measured, more on a slow disk)."""
AGENT_GRACE_S = 45.0
"""After the deadline an agent may finish its step: its tool call, or a turn that waits for the engine."""
_WATCH_INTERVAL_MS = 250
_SETTLE_S = 1.0
_SOCKET_PATH_LIMIT = 100  # sun_path holds 108 bytes; gRPC adds nothing, temporary names do
_INTERRUPTED = 130
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(slots=True)
class _Watched:
    """What the Watch stream has said so far."""

    samples: list[Sample] = field(default_factory=list)
    engine: policy_pb2.EngineView | None = None
    """The last picture of an attached engine: its totals outlive it."""


def run(out: Path, seconds: float, model: str = "default", console: Console | None = None) -> int:
    """Run the demo for about `seconds`, write its files into `out`, print the report.

    Returns the exit code: 0, 1 where an agent failed or nothing was correlated (the reasons are printed), 130 after
    Ctrl-C. Nothing of it is left running in any case.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL, file=console.file)
    try:
        layout = prepare(out)
    except (OSError, subprocess.CalledProcessError) as error:
        console.print(f"error: {escape(str(error))}", style="bold red", highlight=False)
        return 1
    try:
        return asyncio.run(_run(layout, seconds, model, console))
    except processes.StartError as error:
        console.print(f"error: {escape(str(error))}", style="bold red", highlight=False)
        return 1


async def _run(layout: Layout, seconds: float, model: str, console: Console) -> int:
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    with tempfile.TemporaryDirectory(prefix="equipoise-demo-") as short:
        socket = layout.state / SOCKET_NAME
        if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT:
            socket = Path(short) / SOCKET_NAME
        console.print("starting the daemon and its engine", highlight=False)
        begin = time.monotonic()
        daemon = await processes.start_daemon(layout, socket, model)
        was_ready = False
        try:
            async with grpc.aio.insecure_channel(
                f"unix:{socket}", options=(("grpc.default_authority", "localhost"),)
            ) as channel:
                stub = policy_pb2_grpc.PolicyServiceStub(channel)
                status = await _ready(stub, daemon, layout, interrupted)
                if status is None:
                    return _INTERRUPTED
                was_ready = True
                console.print(
                    f"ready after {time.monotonic() - begin:.1f} s: engine {status.engine_url}, probes "
                    f"{status.probe_backend}, cgroups {status.cgroup_layout}; {len(AGENTS)} agents work for "
                    f"{seconds:.0f} s",
                    highlight=False,
                )
                return await _perform(stub, status, layout, socket, seconds, console, interrupted)
        finally:
            processes.kill_leftovers(layout.root / "work")
            if not await processes.end_daemon(daemon, socket) and was_ready:
                words = processes.last_words(layout.daemon_log)
                console.print(f"the daemon did not end cleanly:\n{escape(words)}", style="red", highlight=False)
            if left := processes.remove_cgroups():
                console.print(f"cgroups of the demo are left: {escape(left)}", style="red", highlight=False)


async def _ready(
    stub: policy_pb2_grpc.PolicyServiceStub, daemon: processes.Process, layout: Layout, interrupted: asyncio.Event
) -> policy_pb2.GetStatusResponse | None:
    """Wait until the daemon answers and its engine listens; None after Ctrl-C. Raises StartError."""
    give_up = time.monotonic() + READY_LIMIT_S
    while not interrupted.is_set():
        if daemon.returncode is not None:
            words = processes.last_words(layout.daemon_log)
            raise processes.StartError(f"the daemon ended with {daemon.returncode} before it was ready:\n{words}")
        if time.monotonic() > give_up:
            raise processes.StartError(f"the engine is not up after {READY_LIMIT_S:.0f} s: see {layout.daemon_log}")
        try:
            status: policy_pb2.GetStatusResponse = await stub.GetStatus(policy_pb2.GetStatusRequest(), timeout=5)
            if status.engine_url:
                return status
            if processes.engine_died(layout.daemon_log):
                reason = next(
                    (line for line in status.lacks if line.startswith("engine: ")), f"see {layout.daemon_log}"
                )
                raise processes.StartError(f"the engine does not start: {reason.removeprefix('engine: ')}")
        except grpc.RpcError:
            pass  # not listening yet
        await asyncio.sleep(0.1)
    return None


async def _perform(
    stub: policy_pb2_grpc.PolicyServiceStub,
    status: policy_pb2.GetStatusResponse,
    layout: Layout,
    socket: Path,
    seconds: float,
    console: Console,
    interrupted: asyncio.Event,
) -> int:
    """The agents' time, then the report."""
    watched = _Watched()
    with view_for(console, seconds) as view:
        watching = asyncio.create_task(_watch(stub, watched, view))
        started = [await processes.start_agent(layout, socket, agent, status.engine_url, seconds) for agent in AGENTS]
        try:
            codes = await _wait(started, seconds + AGENT_GRACE_S, interrupted)
            if not interrupted.is_set():
                await asyncio.sleep(_SETTLE_S)  # the last ends and outcomes are still on their way
                finished = await _report(stub, watched, layout, AGENTS, codes)
        finally:
            await asyncio.gather(*(processes.end(process) for process in started))
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    if interrupted.is_set():
        console.print("interrupted: everything was stopped", style="yellow")
        return _INTERRUPTED
    report.write(finished, layout.report)
    tables.print_report(finished, console)
    drawn = _draw(finished, watched.samples, layout, console)
    console.print(
        f"\n{layout.report}\n{layout.timeline if drawn else ''}\n{layout.state}", style="dim", highlight=False
    )
    complaints = finished.complaints()
    for complaint in complaints:
        console.print(f"failed: {escape(complaint)}", style="bold red", highlight=False)
    return 1 if complaints else 0


async def _watch(stub: policy_pb2_grpc.PolicyServiceStub, watched: _Watched, view: View) -> None:
    """Take samples until cancelled; goes on where a stream breaks off."""
    while True:
        try:
            async for response in stub.Watch(policy_pb2.WatchRequest(interval_ms=_WATCH_INTERVAL_MS)):
                watched.samples.append(sample_of(response))
                watched.engine = next((e for e in response.engines if e.attached), watched.engine)
                view.show(response)
        except grpc.RpcError:
            await asyncio.sleep(0.5)


async def _wait(started: Sequence[processes.Process], limit_s: float, interrupted: asyncio.Event) -> list[int | None]:
    """Until every agent has ended, the time is up or Ctrl-C; exit codes, None for one that still ran."""

    async def all_ended() -> None:
        for process in started:
            await process.wait()

    everyone: asyncio.Task[object] = asyncio.create_task(all_ended())
    stop: asyncio.Task[object] = asyncio.create_task(interrupted.wait())
    await asyncio.wait((everyone, stop), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    codes = [process.returncode for process in started]
    for task in (everyone, stop):
        task.cancel()
    await asyncio.gather(everyone, stop, return_exceptions=True)
    return codes


async def _report(
    stub: policy_pb2_grpc.PolicyServiceStub,
    watched: _Watched,
    layout: Layout,
    agents: Sequence[Agent],
    codes: Sequence[int | None],
) -> report.Report:
    """Ask the daemon for everything once more and put the report together."""
    calls = await stub.ListToolCalls(policy_pb2.ListToolCallsRequest(limit=10000), timeout=10)
    decisions = await stub.Explain(policy_pb2.ExplainRequest(limit=1000), timeout=10)
    status = await stub.GetStatus(policy_pb2.GetStatusRequest(), timeout=10)
    return report.build(
        status=status,
        calls=calls.tool_calls,
        decisions=decisions.decisions,
        engines=[watched.engine] if watched.engine else [],
        samples=watched.samples,
        agents=[
            report.read_agent(agent, layout.agent_log(agent), code) for agent, code in zip(agents, codes, strict=True)
        ],
    )


def _draw(finished: report.Report, samples: Sequence[Sample], layout: Layout, console: Console) -> bool:
    try:
        timeline.draw(finished, samples, layout.timeline)
    except ImportError:
        console.print("no picture: matplotlib is missing: pip install 'equipoise[demo]'", style="yellow")
    except ValueError as error:
        console.print(f"no picture: {escape(str(error))}", style="yellow")
    else:
        return True
    return False
