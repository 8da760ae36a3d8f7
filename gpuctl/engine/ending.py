"""Ends the process when it is told to, whatever its threads are doing.

Owns: SIGTERM and SIGINT, from the program's first line on, whatever was inherited: a shell script's `&` starts its
children with SIGINT ignored, and Python leaves it so. A Python signal handler waits until the main thread is back from
C, which loading a model may keep it for minutes; the interpreter's wake-up descriptor is written at once, and a thread
of our own reads it. Must not: know what there is to end (`__main__` says so), or import what takes long.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import cache

_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
_PARKED_S = 0.2


@cache
def ending() -> Ending:
    """The one of this process; the first call, on the main thread, takes over the signals."""
    return Ending()


class Ending:
    def __init__(self) -> None:
        self.code = 0
        """Exit code of the process: 130 where it was interrupted from the terminal."""
        self._cleans: list[Callable[[], object]] = []
        self._leave: Callable[[], object] | None = None
        self._at_once = False
        self._parked = threading.Event()
        self._woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="ending", daemon=True).start()
        for number in _CODES:
            signal.signal(number, self._park)

    def cleaning(self, clean: Callable[[], object]) -> None:
        """What must be done before the process may end at once, said before there is any need of it.

        It is called on another thread, and finds the main thread between two of its calls, or in one that takes long.
        """
        self._cleans.append(clean)

    def leaving(self, leave: Callable[[], object] | None) -> None:
        """How to end in order, once that is possible; None: at once again. A second signal ends at once anyway."""
        self._leave = leave

    def _wait(self) -> None:
        while True:
            number = signal.Signals(self._woken.recv(1)[0])
            if number not in _CODES:
                continue
            self.code = _CODES[number]
            leave, self._leave = self._leave, None
            if leave is None:
                break
            leave()
        try:
            # Else the main thread could make a file just after it was looked for.
            self._at_once = True
            _thread.interrupt_main(number)
            self._parked.wait(_PARKED_S)
            for clean in self._cleans:
                clean()
        finally:
            os._exit(self.code)

    def _park(self, *_: object) -> None:
        """On the main thread, at a signal: once the process ends at once, it goes no further."""
        if self._at_once:
            self._parked.set()
            threading.Event().wait()
