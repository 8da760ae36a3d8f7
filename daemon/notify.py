"""Tells systemd how the daemon is: ready, status, alive, stopping (sd_notify(3), standard library only).

Owns the datagrams to NOTIFY_SOCKET and the watchdog's beat. Outside of systemd every call is a safe no-op. Must not:
decide when the daemon is ready, nor fail because systemd does not listen.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping

_BEATS_PER_TIMEOUT = 2
"""sd_watchdog_enabled(3): ping at half the time that systemd waits."""
_IDLE_S = 3600.0


def ready(status: str = "") -> bool:
    """READY=1. True where systemd was told."""
    return _send(f"READY=1\nMAINPID={os.getpid()}\n{_status_line(status)}")


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return _send(_status_line(text))


def reloading() -> bool:
    """The configuration is read anew; `ready` must follow. MONOTONIC_USEC is what Type=notify-reload asks for."""
    return _send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}\n")


def stopping(text: str = "stopping: everything held back is let go") -> bool:
    return _send(f"STOPPING=1\n{_status_line(text)}")


def watchdog_interval_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Time between two pings; None where systemd asks for none, or asks another process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        timeout_us = int(environment.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return timeout_us / 1e6 / _BEATS_PER_TIMEOUT if timeout_us > 0 else None


async def watchdog(progress: Callable[[], int], summary: Callable[[], str] | None = None) -> None:
    """Ping for as long as `progress()` grows, until cancelled.

    A loop that hangs takes this task with it; one whose turns fail all the time stops counting. In both cases the
    pings end and systemd starts the daemon anew.
    """
    interval_s = watchdog_interval_s()
    last = progress() - 1
    while True:
        now = progress()
        if interval_s is not None and now > last:
            _send("WATCHDOG=1\n" + (_status_line(summary()) if summary else ""))
        last = now
        await asyncio.sleep(interval_s or _IDLE_S)


def _status_line(text: str) -> str:
    """A line break would begin another assignment."""
    line = " ".join(text.split())
    return f"STATUS={line}\n" if line else ""


def _send(message: str) -> bool:
    """Send one datagram; False where there is no systemd, or it does not listen any more."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not message or not address.startswith(("/", "@")):
        return False
    name = "\0" + address[1:] if address.startswith("@") else address  # @: the abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.setblocking(False)
            out.sendto(message.encode(), name)
    except OSError:
        return False
    return True
