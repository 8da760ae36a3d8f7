"""The embedded engine as a child process of the daemon.

Owns starting it, learning its address, and starting it again when it dies (with a growing pause). It knows nothing of
what the engine does: that goes through the hook, as with any other engine. The child dies with us by PDEATHSIG; an
engine that somebody else started is not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from . import log
from .errors import DaemonError
from .sandboxes.processes import tied_to_us

READY_S = 180.0
"""Longest wait for the first answer: the model may have to be requantised."""
PAUSE_S = 1.0
"""Before the first restart; it doubles with each that fails."""
PAUSE_MAX_S = 30.0
END_S = 5.0
"""From SIGTERM to SIGKILL."""
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to start the embedded engine."""

    listen: str = "127.0.0.1:0"
    model: str = "default"
    kv_tokens: int = 8192
    """Tokens of KV that the device tier may hold."""
    host_bytes: int = 256 << 20
    """RAM that swapped KV may take."""
    threads: int = 1
    extra: tuple[str, ...] = ()


class EngineProcess:
    """`run()` keeps it alive until cancelled; `url` is None while it does not serve."""

    def __init__(self, config: EngineConfig, socket: str, on_ready: Callable[[str], object]) -> None:
        self.url: str | None = None
        self.failure: str | None = None
        """Why it does not serve, in one line."""
        self._config = config
        self._socket = socket
        self._on_ready = on_ready
        self._process: asyncio.subprocess.Process | None = None
        self._listen = config.listen

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def run(self) -> None:
        pause_s = PAUSE_S
        try:
            while True:
                code = await self._run_once()
                if self.url is not None:
                    pause_s = PAUSE_S
                self.url = None
                log.warning("engine_died", code=code, restart_in_s=pause_s, reason=self.failure or "")
                await asyncio.sleep(pause_s)
                pause_s = min(PAUSE_MAX_S, 2 * pause_s)
        finally:
            await self._end()

    async def _run_once(self) -> int:
        self._process = await asyncio.create_subprocess_exec(
            *tied_to_us(self._command()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        reading = (
            asyncio.create_task(self._take_address(self._process.stdout, self._process.pid)),
            asyncio.create_task(self._keep_last_line(self._process.stderr)),
        )
        try:
            code = await self._process.wait()
            await asyncio.wait(reading, timeout=LAST_WORDS_S)  # why it died is its last line
            return code
        finally:
            for task in reading:
                task.cancel()

    async def _take_address(self, stream: asyncio.StreamReader, pid: int) -> None:
        async for line in _lines(stream):
            if line.startswith("listening "):
                self.url = line.removeprefix("listening ")
                self.failure = None
                # A restart takes the same port, so that agents find it again.
                self._listen = self.url.removeprefix("http://").rstrip("/")
                log.event("engine_ready", url=self.url, pid=pid)
                self._on_ready(self.url)
            else:
                log.debug("engine_says", line=line)

    async def _keep_last_line(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self.failure = line.removeprefix("error: ")
            log.debug("engine_says", line=line)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _command(self) -> list[str]:
        config = self._config
        return [
            sys.executable,
            "-m",
            "equipoise.gpuctl.engine",
            "--model",
            config.model,
            "--listen",
            self._listen,
            "--attach",
            f"unix:{self._socket}",
            "--kv-tokens",
            str(config.kv_tokens),
            "--host-bytes",
            str(config.host_bytes),
            "--threads",
            str(config.threads),
            *config.extra,
        ]


async def wait_ready(engine: EngineProcess, task: asyncio.Task[None]) -> str:
    """The engine's URL once it serves. Raises DaemonError where it does not come up in READY_S."""
    deadline = asyncio.get_running_loop().time() + READY_S
    while engine.url is None:
        if task.done() or asyncio.get_running_loop().time() > deadline:
            raise DaemonError(f"the embedded engine did not start: {engine.failure or 'no answer'}")
        await asyncio.sleep(0.05)
    return engine.url


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """What is said in it, without blank lines; of a line beyond the reader's limit (64 KiB) the end alone."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue  # too long: the reader has thrown away what it held
        if not line:
            return
        if text := line.decode(errors="replace").strip():
            yield text
