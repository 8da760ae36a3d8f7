"""Who has exited: a callback for the end of a process, by pidfd on the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


def watch(pid: int, on_exit: Callable[[], None]) -> int | None:
    """Call `on_exit` once when the process exits; answers the descriptor that watches. None: it is gone already."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        asyncio.get_running_loop().call_soon(on_exit)
        return None
    asyncio.get_running_loop().add_reader(pidfd, on_exit)
    return pidfd


def unwatch(pidfd: int | None) -> None:
    """Safe for None."""
    if pidfd is not None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
