"""What conversations ask for: the best witness of what an agent starts next.

Owns which sandbox each conversation is of, by its connection, and the commands that are asked for and not answered yet.
Decides nothing about processes. A session counts for the sandbox whose connection it came by, whatever tenant its
engine holds it for: who asks is who will start the command.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from ...policies.events import Event, TurnEnded, TurnStarted
from ...policies.model import NS_PER_S, CgroupId, SessionId
from ...policies.roles import Asked
from ...policies.state import State

_MOST_ASKED = 64
_SESSIONS_COUNT = 16_384
"""Remembered by their connections; past it the oldest are forgotten."""
_LATE_NS = NS_PER_S // 2
"""How much later than its conversation's next turn an exec may be drained."""


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
                    self._asked[sandbox] = [_answered(asked, event) for asked in waiting]
            case _:
                pass
        return None

    def hears(self, sandbox: CgroupId) -> bool:
        """Whether an engine of ours has told what its conversation asks for."""
        return sandbox in self._asked

    def asked(self, sandbox: CgroupId, at_ns: int) -> list[Asked]:
        """What it asked for and had no answer to at this time, the oldest first; what was started is not among it."""
        return [each for each in self._asked.get(sandbox, ()) if each.waits_at(at_ns)]

    def started(self, sandbox: CgroupId, call_id: str) -> None:
        """The command was started: no other is that call. Safe for a sandbox that is gone."""
        if sandbox in self._asked:
            self._asked[sandbox] = [asked for asked in self._asked[sandbox] if asked.id != call_id]

    def answered(self, session: SessionId) -> list[tuple[CgroupId, Asked]]:
        """What the conversation went on after, and nothing is known to have been started for."""
        return [
            (sandbox, each)
            for sandbox, waiting in self._asked.items()
            for each in waiting
            if each.session == session and each.answered_ns is not None
        ]

    def never_started(self, now_ns: int) -> list[tuple[CgroupId, Asked]]:
        """What was answered a while ago, and nothing was started for; told once."""
        found = []
        for sandbox, waiting in self._asked.items():
            old = [each for each in waiting if each.answered_ns is not None and now_ns - each.answered_ns > _LATE_NS]
            if old:
                self._asked[sandbox] = [each for each in waiting if each not in old]
                found += [(sandbox, each) for each in old]
        return found

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


def _answered(asked: Asked, turn: TurnStarted) -> Asked:
    if asked.session != turn.session or asked.answered_ns is not None:
        return asked
    return replace(asked, answered_ns=turn.at_ns)
