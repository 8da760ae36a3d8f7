"""Ends the process when it is told to, whatever its threads are doing.

Owns: SIGTERM and SIGINT. A Python signal handler waits until the main thread is back from C, which loading a model may
keep it for minutes; so both signals are blocked and a thread of their own waits for them. Must not: know what there is
to end (`__main__` says so).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Ending:
    def __init__(self) -> None:
        """Block the signals in this thread, and so in every thread it starts from here on, and begin to wait."""
        self.code = 0
        """Exit code of the process: 130 where it was interrupted from the terminal."""
        self._clean: Callable[[], object] | None = None
        self._leave: Callable[[], object] | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, _CODES)
        threading.Thread(target=self._wait, name="ending", daemon=True).start()

    def cleaning(self, clean: Callable[[], object]) -> None:
        """What must be done before the process may end at once. It is called on another thread."""
        self._clean = clean

    def leaving(self, leave: Callable[[], object] | None) -> None:
        """How to end in order, once that is possible; None: at once again. A second signal ends at once anyway."""
        self._leave = leave

    def _wait(self) -> None:
        while True:
            self.code = _CODES[signal.Signals(signal.sigwait(_CODES))]
            leave, self._leave = self._leave, None
            if leave is None:
                break
            leave()
        if self._clean is not None:
            self._clean()
        os._exit(self.code)
