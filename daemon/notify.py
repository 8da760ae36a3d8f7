"""Telling systemd: ready, status, watchdog, stopping. sd_notify(3) over its datagram socket, by the standard library.

Without NOTIFY_SOCKET in the environment every function does nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

_IDLE_S = 10.0
"""How often the status line is renewed where no watchdog asks for more."""


def ready(status_text: str) -> None:
    """The daemon serves."""
    _send(f"READY=1\nSTATUS={status_text}")


def status(status_text: str) -> None:
    """One line for `systemctl status`."""
    _send(f"STATUS={status_text}")


def stopping() -> None:
    _send("STOPPING=1")


def watchdog_s() -> float | None:
    """Longest time between two signs of life that systemd accepts (WatchdogSec); None: it does not ask for any."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not usec.isdigit() or int(usec) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


async def watchdog(turn_count: Callable[[], int], summary: Callable[[], str]) -> None:
    """Renew the status and, while the loop turns, say so. A loop that hangs is not covered up: it says nothing."""
    limit_s = watchdog_s()
    seen = -1
    while True:
        turned = turn_count()
        alive = "WATCHDOG=1\n" if limit_s is not None and turned != seen else ""
        seen = turned
        _send(f"{alive}STATUS={summary()}")
        await asyncio.sleep(limit_s / 3 if limit_s is not None else _IDLE_S)


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        try:
            to.sendto(message.encode(), address)
        except OSError:
            pass  # systemd is gone or deaf: nothing here depends on it
