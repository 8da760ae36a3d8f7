"""Ends the process when it is told to, whatever its threads are doing.

Owns: SIGTERM and SIGINT. A Python signal handler waits until the main thread is back from C, which loading a model may
keep it for minutes; the interpreter's wake-up descriptor is written at once, and a thread of our own reads it. Must
not: know what there is to end (`__main__` says so).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Ending:
    def __init__(self) -> None:
        """Take over the signals. On the main thread."""
        self.code = 0
        """Exit code of the process: 130 where it was interrupted from the terminal."""
        self._clean: Callable[[], object] | None = None
        self._leave: Callable[[], object] | None = None
        self._woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
        for number in _CODES:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._wait, name="ending", daemon=True).start()

    def cleaning(self, clean: Callable[[], object]) -> None:
        """What must be done before the process may end at once. It is called on another thread."""
        self._clean = clean

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
        if self._clean is not None:
            self._clean()
        os._exit(self.code)
