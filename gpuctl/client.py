"""An engine's end of the hook: dials the daemon, reports, and hands its directives to the engine.

Owns: the connection, its retries, and which message each report and directive is. Must not: decide anything, or know
what engine it speaks for. Fail-open: without a daemon the engine serves on by its own defaults; whenever a stream is
lost, every hold the daemon made ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from ..policies.model import KvTier
from .api.v1 import engine_pb2 as pb
from .api.v1 import engine_pb2_grpc
from .directives import DIRECTIVES, Directive, DirectiveBase, Outcome, OutcomeStatus, PreemptMode
from .messages import SHARED
from .peers import PeerIs, Peers
from .reports import (
    EngineFacts,
    Listener,
    Occupancy,
    PeerSeen,
    Report,
    Reported,
    SessionMoved,
    TurnEnded,
    TurnPreempted,
    TurnStarted,
)
from .translation import Enumeration, OneOf, Translation

_log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 3.0
# A daemon that stops reading must not grow the engine's memory; the next occupancy is a full picture again.
_MAX_QUEUED_REPORTS = 4096
_DEFAULT_LIFE_NS = 60 * 10**9


class HookedEngine(Protocol):
    """What an engine must be able to do to be attached; each of it from any thread, and without blocking."""

    def facts(self) -> EngineFacts:
        """Who it is, its kind and the directives it can apply among it."""

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every report from now on, the whole occupancy first. Returns how to stop it."""

    def direct(self, directive: Directive) -> None:
        """Apply it at the next step border; its outcomes are reports. A repeated id is answered, not applied again."""

    def release_holds(self) -> None:
        """The daemon is gone: every hold it made ends."""


async def attach(address: str, engine: HookedEngine, peers: Peers | None = None) -> None:
    """Stay attached to the daemon at `address` (`unix:/path`) until cancelled; retry with backoff for ever.

    `peers`: of an engine that asks who its clients are, on this event loop.
    """
    retry_s = FIRST_RETRY_S
    while True:
        connected_at = time.monotonic()
        try:
            await _one_stream(address, engine, peers)
            reason = "the daemon closed the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            engine.release_holds()
        if time.monotonic() - connected_at > LONGEST_RETRY_S:
            retry_s = FIRST_RETRY_S
        _log.info("detached address=%s reason=%r retry_s=%.1f", address, reason, retry_s)
        await asyncio.sleep(retry_s * random.uniform(0.8, 1.2))  # engines of one host must not dial in step
        retry_s = min(LONGEST_RETRY_S, retry_s * 2)


async def _one_stream(address: str, engine: HookedEngine, peers: Peers | None) -> None:
    """Serve one stream to its end. Raises AioRpcError where it could not be opened or was cut."""
    loop = asyncio.get_running_loop()
    reports: asyncio.Queue[pb.EngineReport] = asyncio.Queue(_MAX_QUEUED_REPORTS)

    def put(message: pb.EngineReport) -> None:
        if reports.full():
            reports.get_nowait()
            _log.warning("report_lost kind=%s", message.WhichOneof("report"))
        reports.put_nowait(message)

    def carry(reported: Reported) -> None:
        try:
            loop.call_soon_threadsafe(put, report_message(reported))
        except RuntimeError:
            pass  # the loop is closed: the process is going down

    async with grpc.aio.insecure_channel(address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
        facts = engine.facts()
        await call.write(hello_message(facts))
        stop_listening = engine.listen(carry)
        stop_asking = peers.listen(lambda asked: put(report_message(asked))) if peers is not None else None
        writer = asyncio.create_task(_write(call, reports))
        try:
            async for message in call:
                if message.WhichOneof("directive") == "peer_is" and peers is not None:
                    peers.take(_PEER_IS.decode(message.peer_is))
                else:
                    _take(message, engine, facts.directives, put)
        finally:
            stop_listening()
            if stop_asking is not None:
                stop_asking()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()


async def _write(
    call: grpc.aio.StreamStreamCall[pb.EngineReport, pb.EngineDirective], reports: asyncio.Queue[pb.EngineReport]
) -> None:
    while True:
        await call.write(await reports.get())


def _take(
    message: pb.EngineDirective,
    engine: HookedEngine,
    supported: frozenset[type[DirectiveBase]],
    put: Callable[[pb.EngineReport], None],
) -> None:
    directive = directive_from(message, time.monotonic_ns())
    if directive is None or type(directive) not in supported:
        kind = message.WhichOneof("directive")
        outcome = Outcome(message.directive_id, OutcomeStatus.REJECTED, f"directive {kind}: not known to this engine")
        put(report_message(Reported(time.monotonic_ns(), outcome)))
        return
    engine.direct(directive)


# Translation

_TIERS = Enumeration(KvTier, pb.KvTier, unknown=KvTier.HOST)
_MODES = Enumeration(PreemptMode, pb.PreemptMode, unknown=PreemptMode.RECOMPUTE)
_DIRECTIVES: OneOf[Directive, pb.EngineDirective] = OneOf(
    pb.EngineDirective,
    "directive",
    (
        Translation(kind, getattr(pb, kind.__name__), here=("directive_id", "deadline_ns"), using=(_TIERS, _MODES))
        for kind in DIRECTIVES
    ),
    there=("peer_is",),
)
_PEER_IS = Translation(PeerIs, pb.PeerIs)
_STATUSES = Enumeration(OutcomeStatus, pb.DirectiveStatus, unknown=OutcomeStatus.REJECTED)
_REPORTS: OneOf[Report, pb.EngineReport] = OneOf(
    pb.EngineReport,
    "report",
    (
        Translation(Occupancy, pb.Occupancy, here=("tiers",), using=SHARED),
        Translation(TurnStarted, pb.TurnStarted),
        Translation(PeerSeen, pb.PeerSeen),
        Translation(TurnEnded, pb.TurnEnded, using=SHARED),
        Translation(SessionMoved, pb.SessionMoved, using=SHARED),
        Translation(TurnPreempted, pb.TurnPreempted, using=SHARED),
        Translation(Outcome, pb.DirectiveOutcome, using=(_STATUSES,)),
    ),
    there=("hello",),
)
_HELLO = Translation(EngineFacts, pb.EngineHello, here=("directives",), there=("supported_directives",), using=SHARED)


def directive_from(message: pb.EngineDirective, now_ns: int) -> Directive | None:
    """The directive of a message; None for a kind this version does not know."""
    deadline_ns = message.deadline_ns or now_ns + _DEFAULT_LIFE_NS
    return _DIRECTIVES.decode(message, directive_id=message.directive_id, deadline_ns=deadline_ns)


def hello_message(facts: EngineFacts) -> pb.EngineReport:
    supported = sorted(_DIRECTIVES.name(kind) for kind in facts.directives)
    return pb.EngineReport(at_ns=time.monotonic_ns(), hello=_HELLO.encode(facts, supported_directives=supported))


def report_message(reported: Reported) -> pb.EngineReport:
    return _REPORTS.encode(reported.report, at_ns=reported.at_ns)
