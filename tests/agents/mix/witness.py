"""A scripted engine: it serves agents of the mix, and tells the daemon what their conversations ask for.

Owns a TCP port of loopback and one end of the engines' hook. It answers a turn the moment its report has left, as a
real engine does. With `silent` it serves without the daemon's knowing of it. `Heard` is the hook's end alone, for a
model that serves by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from itertools import count

from equipoise.gpuctl.client import attach
from equipoise.gpuctl.directives import Directive
from equipoise.gpuctl.reports import EngineFacts, Listener, Reported, TurnEnded, TurnStarted
from equipoise.policies.accounting import TurnCost
from equipoise.policies.model import AskedToolCall, CostModel, FinishReason, SessionId, TenantId, TurnId

_NUMBER = count(1)


class Reporter:
    """An engine of the hook that reports turns, from any thread, and can do nothing of what it may be asked for."""

    def __init__(self, port: int = 0) -> None:
        """`port`: of loopback, where it is served."""
        self.port = port
        self.attached = threading.Event()
        self._listener: Listener | None = None

    def turn(
        self, session: SessionId, peer: tuple[str, int], asked: tuple[AskedToolCall, ...], tenant: str = "gold"
    ) -> None:
        """A whole turn; `peer`: address and port of the client."""
        turn, of = TurnId(f"{session}-{next(_NUMBER)}"), TenantId(tenant)
        reason = FinishReason.TOOL_CALLS if asked else FinishReason.STOP
        self._report(TurnStarted(session, of, turn, 10, 0, peer[1], peer[0]))
        self._report(TurnEnded(session, of, turn, reason, 10, 0, 0, 5, 1, 0, TurnCost(), asked))

    def _report(self, report: TurnStarted | TurnEnded) -> None:
        if self._listener is not None:
            self._listener(Reported(time.monotonic_ns(), report))

    # -- as an engine of the hook

    def facts(self) -> EngineFacts:
        listening = (f"127.0.0.1:{self.port}",)
        none = (16, 100_000, 0, 0, CostModel(), frozenset[type]())
        return EngineFacts(f"mix-{os.getpid()}-{self.port}", "scripted", "script", os.getpid(), *none, listening)

    def listen(self, listener: Listener) -> Callable[[], None]:
        self._listener = listener
        self.attached.set()

        def stop() -> None:
            self._listener = None

        return stop

    def direct(self, directive: Directive) -> None:
        """It can do nothing of the kind."""

    def release_holds(self) -> None:
        """It holds nothing."""


class Heard(Reporter):
    """Attached while it is entered."""

    def __init__(self, address: str, port: int) -> None:
        """`address`: the daemon's, "unix:/path"."""
        super().__init__(port)
        self._loop = asyncio.new_event_loop()
        self._attaching = self._loop.create_task(attach(address, self))
        self._thread = threading.Thread(target=self._run, name="heard", daemon=True)

    def __enter__(self) -> Heard:
        self._thread.start()
        assert self.attached.wait(10), "the daemon takes no engine"
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._attaching.cancel)
        self._thread.join(10)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._attaching)


class Witness(Reporter):
    """Serves from `start()` to `close()`."""

    def __init__(self, address: str, *, silent: bool = False) -> None:
        """`address`: the daemon's, "unix:/path"."""
        super().__init__()
        self._address = address
        self._silent = silent
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def start(self) -> Witness:
        self._thread.start()
        assert self._ready.wait(10)
        assert self._silent or self.attached.wait(10), "the daemon takes no engine"
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        attaching = None if self._silent else asyncio.create_task(attach(self._address, self))
        self._ready.set()
        await self._stop.wait()
        if attaching is not None:
            attaching.cancel()
            await asyncio.gather(attaching, return_exceptions=True)
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address, port = writer.get_extra_info("peername")[:2]
        session = SessionId(f"mix-{next(_NUMBER)}")
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                asked = tuple(AskedToolCall(number, "shell", text) for number, text in json.loads(line))
                self.turn(session, (address, port), asked)
                writer.write(b"go on\n")
                await writer.drain()
        writer.close()
