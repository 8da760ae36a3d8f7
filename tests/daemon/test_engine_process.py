"""The engine as a child: its address, its death and its last words. The child is a real process, of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import pytest
from equipoise.daemon import engine_process
from equipoise.daemon.engine_process import EngineConfig, EngineProcess, wait_ready
from equipoise.daemon.errors import DaemonError
from equipoise.tests.fixtures.running_daemon import process_state


class Scripted(EngineProcess):
    """Runs this Python code in the engine's place; `$listen` in it is the address that it was given."""

    code = ""

    def _command(self) -> list[str]:
        return [sys.executable, "-S", "-u", "-c", self.code.replace("$listen", self._listen)]


class Run:
    def __init__(self, code: str) -> None:
        self.ready: list[str] = []
        self.engine = Scripted(EngineConfig(), "/nowhere.sock", self.ready.append)
        self.engine.code = code
        self.task = asyncio.create_task(self.engine.run())

    async def until(self, claim, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not claim():
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def run() -> AsyncIterator[object]:
    started: list[Run] = []

    def start(code: str) -> Run:
        started.append(Run(code))
        return started[-1]

    yield start
    for one in started:
        await one.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart after 50 ms rather than seconds."""
    monkeypatch.setattr(engine_process, "PAUSE_MAX_S", 0.05)
    monkeypatch.setattr(engine_process, "PAUSE_S", 0.05)


SERVE = "print('listening http://127.0.0.1:4711'); import time; time.sleep(60)"


async def test_the_address_is_what_it_prints(run):
    one = run("print('loading'); " + SERVE)
    assert await wait_ready(one.engine, one.task) == "http://127.0.0.1:4711"
    assert one.ready == ["http://127.0.0.1:4711"] and one.engine.failure is None
    assert process_state(one.engine.pid) != ""


async def test_one_that_dies_is_started_again_on_the_same_port(run):
    one = run("print('listening http://$listen'.replace(':0', ':4711')); import time; time.sleep(60)")
    await one.until(lambda: one.engine.url)
    first = one.engine.pid
    os.kill(first, 9)
    await one.until(lambda: len(one.ready) == 2)
    assert one.engine.pid != first and one.ready == ["http://127.0.0.1:4711"] * 2
    assert one.engine._listen == "127.0.0.1:4711"


async def test_the_last_line_of_one_that_died_is_why(run):
    one = run("import sys; sys.stderr.write('Traceback\\nnoise\\nerror: x.gguf: not a GGUF\\n\\n'); sys.exit(1)")
    await one.until(lambda: one.engine.failure)
    assert one.engine.failure == "x.gguf: not a GGUF" and one.engine.url is None and not one.ready


async def test_the_last_line_is_read_even_from_one_that_dies_at_once(run):
    one = run("import os; os.write(2, b'x' * 200_000 + b'\\nthe end\\n'); os._exit(3)")
    await one.until(lambda: one.engine.failure == "the end")


async def test_serving_again_takes_the_failure_back(run, tmp_path):
    mark = tmp_path / "once"
    one = run(
        f"import os, sys, time\nif not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close()\n"
        "    sys.exit('first try')\n" + SERVE
    )
    await one.until(lambda: one.engine.failure)
    await one.until(lambda: one.engine.url)
    assert one.engine.failure is None


async def test_waiting_for_one_that_cannot_start_ends_with_its_reason(run, monkeypatch):
    monkeypatch.setattr(engine_process, "READY_S", 0.5)
    one = run("import sys; sys.exit('no model here')")
    with pytest.raises(DaemonError, match="the embedded engine did not start: no model here"):
        await wait_ready(one.engine, one.task)


async def test_ending_ends_the_child_a_stubborn_one_too(run, monkeypatch):
    monkeypatch.setattr(engine_process, "END_S", 0.2)
    one = run("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE)
    await one.until(lambda: one.engine.url)
    pid = one.engine.pid
    await one.end()
    assert process_state(pid) == ""


def test_the_child_dies_with_us():
    code = (
        "import asyncio, sys, os\nfrom equipoise.daemon.engine_process import EngineConfig, EngineProcess\n"
        "class E(EngineProcess):\n"
        f"    def _command(self): return [sys.executable, '-S', '-u', '-c', {SERVE!r}]\n"
        "e = E(EngineConfig(), '/x', lambda url: (print(e.pid, flush=True), os.kill(os.getpid(), 9)))\n"
        "asyncio.run(e.run())\n"
    )
    import subprocess
    import time

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == -9
    deadline = time.monotonic() + 5
    while process_state(int(done.stdout)) not in ("", "Z"):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
