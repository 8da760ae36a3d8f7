"""Keeps a guardian process alive beside the daemon: started before anything is held back, replaced when it dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

from .. import log
from ..errors import GuardianError
from .guardian import Guardian

CHECK_S = 1.0


class Guarding:
    def __init__(self, journal: Path, base: str | None) -> None:
        """`base`: None where there are no cgroups. Raises GuardianError where none can be started."""
        self._journal = journal
        self._base = base
        self._guardian = Guardian.start(journal, base=base)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            if self._guardian.alive():
                continue
            died = self._guardian
            log.warning("guardian_died", pid=died.pid)
            try:
                self._guardian = Guardian.start(self._journal, base=self._base)
            except GuardianError as error:
                log.warning("guardian_not_replaced", error=str(error))
                continue
            died.close()

    def close(self) -> None:
        self._guardian.close()
