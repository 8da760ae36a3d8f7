"""From the event loop to the engine's thread and back.

Owns: how results and errors cross over. Must not: know what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from .engine import Engine

_T = TypeVar("_T")


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
