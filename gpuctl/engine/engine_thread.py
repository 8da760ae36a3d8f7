"""From the event loop to the engine's thread and back.

Owns: how results and errors cross over. Must not: know what is asked.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from .engine import Engine

_T = TypeVar("_T")


class Deliveries:
    """Calls to event loops, those of one step all at once.

    Each wake-up of a loop costs the engine's thread a system call, and the interpreter's lock while the loop works: one
    for every token made a step of 8 turns 1 % longer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()  # calls leave in the order they came, whoever sends them
        self._waiting: collections.deque[tuple[asyncio.AbstractEventLoop, Callable[[], Any]]] = collections.deque()
        engine.at_border(self.send)

    def put(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> None:
        """Call it on the loop: at the next step border where the engine's thread says so, else at once."""
        self._waiting.append((loop, function))
        if not self._engine.reaches_border():
            self.send()

    def send(self) -> None:
        with self._lock:
            by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], Any]]] = {}
            while self._waiting:
                loop, function = self._waiting.popleft()
                by_loop.setdefault(loop, []).append(function)
            for loop, functions in by_loop.items():
                threadsafe(loop, partial(_call_all, functions))


def _call_all(functions: Sequence[Callable[[], Any]]) -> None:
    for function in functions:
        function()


async def on_engine(engine: Engine, function: Callable[[], _T]) -> _T:
    """Run on the engine's thread at the next step border; its result or its error."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except Exception as error:  # whatever it is belongs to the call, not to the engine's loop
            failed = error
            threadsafe(loop, lambda: fail(answer, failed))
        else:
            threadsafe(loop, lambda: settle(answer, result))

    engine.call(run)
    return await answer


def threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> None:
    """Call it on the loop, from any thread. A no-op where the loop is closed."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        pass  # the event loop is closed: the process is going down


def settle(answer: asyncio.Future[_T], result: _T) -> None:
    """Answer a future that may have been answered or given up."""
    if not answer.done():
        answer.set_result(result)


def fail(answer: asyncio.Future[_T], error: BaseException) -> None:
    """The same with an error."""
    if not answer.done():
        answer.set_exception(error)
