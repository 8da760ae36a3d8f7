"""What conversations ask for: the best witness of what an agent starts next.

Owns which sandbox each conversation is of, by its connection, and the commands that are asked for and not answered yet.
Decides nothing about processes. A session counts for the sandbox whose connection it came by, whatever tenant its
engine holds it for: who asks is who will start the command.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ...policies.events import Event, TurnEnded, TurnStarted
from ...policies.model import CgroupId, SessionId
from ...policies.roles import Asked
from ...policies.state import State

_MOST_ASKED = 64
_SESSIONS_COUNT = 16_384
"""Remembered by their connections; past it the oldest are forgotten."""


class Witness:
    """`hear(event)` takes engines' reports as they come, before the loop's turn."""

    def __init__(self, state: State, sandbox_at: Callable[[TurnStarted], CgroupId | None]) -> None:
        """`sandbox_at`: whose connection a turn came by."""
        self._state = state
        self._sandbox_at = sandbox_at
        self._sandboxes: OrderedDict[SessionId, CgroupId] = OrderedDict()
        self._asked: dict[CgroupId, list[Asked]] = {}

    def hear(self, event: Event) -> CgroupId | None:
        """The sandbox of which more is asked for now; None where nothing new is asked."""
        match event:
            case TurnEnded(asked=calls) if calls and (sandbox := self._sandbox_of(event.session)) is not None:
                waiting = self._asked.setdefault(sandbox, [])
                waiting += [Asked(call.call_id, event.session, call.command, event.at_ns) for call in calls]
                del waiting[:-_MOST_ASKED]
                return sandbox
            case TurnStarted(session=session):
                if (sandbox := self._sandbox_at(event)) is not None:
                    self._sandboxes[session] = sandbox
                    self._sandboxes.move_to_end(session)
                    if len(self._sandboxes) > _SESSIONS_COUNT:
                        self._sandboxes.popitem(last=False)
                # Its results are in, or nobody wants them any more.
                for sandbox, waiting in self._asked.items():
                    self._asked[sandbox] = [asked for asked in waiting if asked.session != session]
            case _:
                pass
        return None

    def hears(self, sandbox: CgroupId) -> bool:
        """Whether an engine of ours has told what its conversation asks for."""
        return sandbox in self._asked

    def asked(self, sandbox: CgroupId) -> list[Asked]:
        """What it asks for now, the oldest first."""
        return self._asked.get(sandbox, [])

    def open_of(self, session: SessionId) -> list[tuple[CgroupId, Asked]]:
        """What the conversation asked for and nothing was started for."""
        return [(sandbox, each) for sandbox, asked in self._asked.items() for each in asked if each.session == session]

    def answered(self, sandbox: CgroupId, call_id: str) -> None:
        """The command was started: no other is that call."""
        self._asked[sandbox] = [asked for asked in self.asked(sandbox) if asked.id != call_id]

    def forget(self, sandbox: CgroupId) -> None:
        self._asked.pop(sandbox, None)
        for session in [s for s, of in self._sandboxes.items() if of == sandbox]:
            del self._sandboxes[session]

    def _sandbox_of(self, session: SessionId) -> CgroupId | None:
        if (by_connection := self._sandboxes.get(session)) in self._state.sandboxes:
            return by_connection
        if (joined := self._state.sandbox_of(session)) is not None:
            return joined
        return next((s.cgroup_id for s in self._state.sandboxes.values() if s.session == session), None)
