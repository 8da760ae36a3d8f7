"""Engines with a socket each and a runner that only counts, and clients that read their turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from equipoise.gpuctl.engine.compute.runner import BatchSlice, StepResult
from equipoise.gpuctl.engine.engine import Engine, EngineConfig
from equipoise.gpuctl.engine.engine_thread import Deliveries, on_engine
from equipoise.gpuctl.engine.openai.http import TurnStream
from equipoise.gpuctl.engine.peer.service import PeerService
from equipoise.gpuctl.engine.schedule.sequence import (
    SessionId,
    TenantId,
    TextDelta,
    TokenLogprob,
    TurnFinished,
    TurnRequest,
)
from equipoise.gpuctl.engine.tiers.table import in_memory
from equipoise.gpuctl.reports import Reported, TurnEnded
from equipoise.tests.gpuctl.engine.fakes import FakeModel, FakeRunner

PROMPT = "once upon a time there was a fox"
TOKENS = 150
TIMEOUT_S = 20


class PacedRunner(FakeRunner):
    """Takes a moment for each step, so that there is a midst of a turn; gives log probabilities where asked."""

    def step(self, slices: Sequence[BatchSlice]) -> StepResult:
        time.sleep(0.003)
        result = super().step(slices)
        sampled = [
            TokenLogprob(token, -token / 7, ((token, -token / 7), (1, -9.25)))
            if item.logprobs is not None and isinstance(token, int)
            else token
            for item, token in zip(slices, result.sampled, strict=True)
        ]
        return StepResult(result.status, tuple(sampled))


class Peer:
    """An engine with its socket."""

    def __init__(self, path: Path, fingerprint: str, **config: Any) -> None:
        self.address = f"unix:{path}"
        self.path = path
        self.runner = PacedRunner(physical_tokens=4096)
        settings: dict[str, Any] = {"kv_tokens": 2000, **config}
        tiers = in_memory(settings.pop("host_bytes", 16 * 4000))
        self.engine = Engine(cast(Any, FakeModel()), self.runner, EngineConfig(**settings), tiers)
        self.deliveries = Deliveries(self.engine)
        self.service = PeerService(self.engine, fingerprint)
        self.reports: list[Reported] = []
        self.engine.listen(self.reports.append)

    async def ask(self, session: str = "s", tokens: int = TOKENS, **request: Any) -> Client:
        stream = TurnStream(self.engine, self.deliveries)
        await stream.open(TurnRequest(SessionId(session), TenantId("t"), PROMPT, max_tokens=tokens, **request))
        return Client(stream)

    async def do(self, function: Callable[[], Any]) -> Any:
        return await on_engine(self.engine, function)

    async def holds(self) -> tuple[int, int]:
        """Sessions and tokens, the books having been checked."""

        def count() -> tuple[int, int]:
            ledger = self.engine._ledger
            ledger.check_integrity()
            return len(self.engine._scheduler.sessions), ledger.device_used_tokens + sum(
                each.used_tokens for each in ledger.lower
            )

        return cast("tuple[int, int]", await self.do(count))

    async def until_it_holds(self, sessions: int) -> int:
        """Wait for so many sessions, and for none until nothing is set aside either; the tokens held then."""
        async with asyncio.timeout(TIMEOUT_S):
            while (held := await self.holds())[0] != sessions or (not sessions and held[1]):
                await asyncio.sleep(0.01)
        return held[1]

    @property
    def ended(self) -> list[TurnEnded]:
        return [r.report for r in self.reports if isinstance(r.report, TurnEnded)]


class Client:
    """Reads one turn."""

    def __init__(self, stream: TurnStream) -> None:
        self.stream = stream
        self._events = stream.events()
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.end: TurnFinished | None = None

    async def read(self, characters: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.text) < characters and self.end is None:
                event = await anext(self._events)
                if isinstance(event, TextDelta):
                    self.text += event.text
                    self.logprobs += event.logprobs
                else:
                    self.end = event

    async def finish(self) -> TurnFinished:
        await self.read(1 << 30)
        assert self.end is not None
        return self.end


@asynccontextmanager
async def peers(folder: Path, *configs: dict[str, Any], fingerprints: str = "fff") -> AsyncIterator[list[Peer]]:
    async with AsyncExitStack() as stack:
        made = []
        for number, config in enumerate(configs):
            peer = Peer(folder / f"{number}.sock", fingerprints[number], **config)
            peer.engine.start()
            await peer.service.start(peer.address)
            stack.push_async_callback(asyncio.to_thread, peer.engine.stop)
            stack.push_async_callback(peer.service.stop)
            made.append(peer)
        yield made


EXPECTED = FakeRunner().expected_output(PROMPT, TOKENS)
