"""The policy in force, and its change while the daemon runs.

Owns reloading: on SIGHUP, when a file has changed, by rpc. All of a policy changes at once, as one event of the loop,
or nothing of it does: what is wrong is logged, kept for the status, and the policy in force stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...policies.document import changes
from ...policies.events import PolicyApplied
from ...policies.policy import Policy
from .. import log
from ..errors import PolicyError
from .layers import Text, policy_of
from .sources import Sources, Stamp

LOOK_S = 0.3
"""Between two looks at the files. A file must look the same twice: it may be in the middle of being written."""


@dataclass(frozen=True, slots=True)
class InForce:
    """What the status says of the policy."""

    policy: Policy
    layers: tuple[str, ...]
    """The files it is made of, or what the rpc called its texts."""
    applied_ns: int
    refused: tuple[str, ...] = ()
    """What is wrong with the files as they are now; empty: they are in force, or an rpc came later."""


class PolicyKeeper:
    """Raises PolicyError when made: a daemon does not start with a policy that nobody can read."""

    def __init__(self, sources: Sources, now_ns: Callable[[], int]) -> None:
        self._sources = sources
        self._now_ns = now_ns
        self._seen = self._looked_at = sources.stamp()
        texts = sources.texts()
        self.in_force = InForce(policy_of(texts), tuple(text.name for text in texts), now_ns())
        self._emit: Callable[[PolicyApplied], None] = lambda event: None

    def told_to(self, emit: Callable[[PolicyApplied], None]) -> None:
        """Whoever makes an event of each change."""
        self._emit = emit

    def reload(self, why: str) -> list[str]:
        """Read the files again; what has changed, one line each. Raises PolicyError, and the policy stays."""
        self._seen = self._looked_at = self._sources.stamp()
        try:
            texts = self._sources.texts()
            policy = policy_of(texts)
        except PolicyError as error:
            now = self.in_force
            self.in_force = InForce(now.policy, now.layers, now.applied_ns, tuple(error.lines))
            for line in error.lines:
                log.warning("policy_refused", why=why, problem=line, in_force=now.policy.name)
            raise
        return self._put(policy, texts, why)

    def apply(self, texts: Sequence[Text], *, only_check: bool = False) -> list[str]:
        """Put these texts in force until the files change, or nothing where `only_check`; what changes, a line each.

        Raises PolicyError.
        """
        policy = policy_of(texts)
        return changes(self.in_force.policy, policy) if only_check else self._put(policy, texts, "asked for by rpc")

    def on_hangup(self) -> None:
        """SIGHUP."""
        with contextlib.suppress(PolicyError):  # said in the log and in the status
            self.reload("SIGHUP")

    async def run(self) -> None:
        """Look at the files until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Reload where the files have changed since they were last read, and not since the last look."""
        stamp: Stamp = self._sources.stamp()
        settled, self._looked_at = stamp == self._looked_at, stamp
        if settled and stamp != self._seen:
            with contextlib.suppress(PolicyError):
                self.reload("its files have changed")

    def _put(self, policy: Policy, texts: Sequence[Text], why: str) -> list[str]:
        changed = changes(self.in_force.policy, policy)
        self.in_force = InForce(policy, tuple(text.name for text in texts), self._now_ns())
        log.event("policy_applied", why=why, policy=policy.name, mode=policy.mode, changes=len(changed))
        if changed:
            self._emit(PolicyApplied(self.in_force.applied_ns, policy))
        return changed
