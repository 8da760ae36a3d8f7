"""The one mutable picture of the host. Events go in through `apply`, a frozen Snapshot comes out.

Owns the table of what each event means; the meanings themselves are in the files of their subjects (`tool_calls.py`,
`facts.py`, `sessions.py`, `joins.py`, `outcomes.py`, `processes.py`, `host.py`). One owner drives it (the daemon's
loop, or a replay); it has no clock: time comes with the events and with `snapshot(now_ns)`. It mutates in place,
because a replay of 10,000 sessions would otherwise spend its time copying; what leaves it is frozen.
"""

from __future__ import annotations

from ..events import Event
from ..model import NS_PER_S, CgroupId, SessionId
from ..snapshot import Snapshot
from . import facts, host, joins, outcomes, processes, sessions, tool_calls
from .picture import Picture

REMEMBER_NS = 60 * NS_PER_S
"""How long a finished tool call stays in the picture."""
ARMS = dict((*tool_calls.ARMS, *facts.ARMS, *sessions.ARMS, *joins.ARMS, *outcomes.ARMS, *host.ARMS, *processes.ARMS))
"""What each event does; a test holds it against the closed union `Event`."""


class State(Picture):
    """Tenants, sandboxes, tool calls, sessions and engines as they are known now.

    Invariants (`check_integrity`): every tool call's sandbox was registered when it started; an alias never points at
    an alias; a session in the picture belongs to an engine in the picture.
    """

    def apply(self, event: Event) -> State:
        """Take in one event; returns itself. Never raises: an event about the unknown is counted as late."""
        ARMS[type(event)](self, event)
        return self

    def snapshot(self, now_ns: int) -> Snapshot:
        """The picture at now_ns; forgets tool calls that finished long ago."""
        self._forget(now_ns)
        host.watch_pressure(self, now_ns)
        return Snapshot(
            now_ns=now_ns,
            host=self.host,
            tenants=self.policy.tenants,
            sandboxes=tuple(self.sandboxes[key] for key in sorted(self.sandboxes)),
            tool_calls=tuple(self.tool_calls[key] for key in sorted(self.tool_calls)),
            processes=tuple(self.processes[key] for key in sorted(self.processes)),
            sessions=tuple(self.sessions[key] for key in sorted(self.sessions)),
            engines=tuple(self.engines[key] for key in sorted(self.engines)),
            estimates=self.estimates,
            pressed=tuple(self._pressed.items()),
            weights_told=frozenset(self._weights),
            left_behind=frozenset(self._left_behind & self.sessions.keys()),
        )

    def sandbox_of(self, session: SessionId) -> CgroupId | None:
        """The sandbox whose connection asked for the session's last turn; None: not known."""
        _, joined = self._joins.get(session, (None, None))
        return joined

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant is broken; for tests."""
        tool_calls.check(self)
        sessions.check(self)
        joins.check(self)

    def _forget(self, now_ns: int) -> None:
        tool_calls.forget(self, now_ns - REMEMBER_NS)
        sessions.forget(self)
        outcomes.forget(self, now_ns - REMEMBER_NS)
