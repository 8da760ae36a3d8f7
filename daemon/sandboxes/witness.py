"""What conversations ask for: the best witness of what an agent starts next.

Owns whose each conversation is, by its connection, and the commands that are asked for and not answered yet. Decides
nothing about processes. A session counts for the sandbox whose connection it came by, whatever tenant its engine holds
it for: who asks is who will start the command. Where two conversations of a sandbox ask for the same words at once, it
is the process at the connection that tells whose child is whose call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...policies.events import Event, TurnEnded, TurnStarted
from ...policies.model import NS_PER_S, CgroupId, SessionId
from ...policies.roles import Asked
from ...policies.state import State

_MOST_ASKED = 64
_SESSIONS_COUNT = 16_384
"""Remembered by their connections; past it the oldest are forgotten."""
_LATE_NS = NS_PER_S // 2
"""How much later than its conversation's next turn an exec may be drained."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is at the other end of an engine's connection."""

    sandbox: CgroupId
    pid: int | None
    """The process that opened it; None: one of several."""


class Witness:
    """`hear(event)` takes engines' reports as they come, before the loop's turn."""

    def __init__(self, state: State, owner_at: Callable[[TurnStarted], Owner | None]) -> None:
        """`owner_at`: whose connection a turn came by."""
        self._state = state
        self._owner_at = owner_at
        self._owners: OrderedDict[SessionId, Owner] = OrderedDict()
        self._asked: dict[CgroupId, list[Asked]] = {}

    def hear(self, event: Event) -> CgroupId | None:
        """The sandbox of which more is asked for now; None where nothing new is asked."""
        match event:
            case TurnEnded(asked=calls) if calls and (sandbox := self._sandbox_of(event.session)) is not None:
                waiting = self._asked.setdefault(sandbox, [])
                owner = self._owners.get(event.session)
                pid = owner.pid if owner is not None else None
                waiting += [Asked(c.call_id, event.session, c.command, event.at_ns, pid=pid) for c in calls]
                del waiting[:-_MOST_ASKED]
                return sandbox
            case TurnStarted(session=session):
                if (owner := self._owner_at(event)) is not None:
                    self._owners[session] = owner
                    self._owners.move_to_end(session)
                    if len(self._owners) > _SESSIONS_COUNT:
                        self._owners.popitem(last=False)
                # Its results are in, or nobody wants them any more.
                for sandbox, waiting in self._asked.items():
                    self._asked[sandbox] = [_answered(asked, event) for asked in waiting]
            case _:
                pass
        return None

    def hears(self, sandbox: CgroupId) -> bool:
        """Whether an engine of ours has told what its conversation asks for."""
        return sandbox in self._asked

    def asked(self, sandbox: CgroupId, at_ns: int, runtime: int | None = None) -> list[Asked]:
        """What it asked for and had no answer to at this time, the oldest first; what was started is not among it.

        What came by a connection of the process `runtime` goes before all else. The rest stays: a conversation may go
        by way of a proxy that runs beside the agent.
        """
        waiting = [each for each in self._asked.get(sandbox, ()) if each.waits_at(at_ns)]
        return sorted(waiting, key=lambda each: runtime is None or each.pid != runtime)

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
        for session in [s for s, owner in self._owners.items() if owner.sandbox == sandbox]:
            del self._owners[session]

    def _sandbox_of(self, session: SessionId) -> CgroupId | None:
        owner = self._owners.get(session)
        if owner is not None and owner.sandbox in self._state.sandboxes:
            return owner.sandbox
        if (joined := self._state.sandbox_of(session)) is not None:
            return joined
        return next((s.cgroup_id for s in self._state.sandboxes.values() if s.session == session), None)


def _answered(asked: Asked, turn: TurnStarted) -> Asked:
    if asked.session != turn.session or asked.answered_ns is not None:
        return asked
    return replace(asked, answered_ns=turn.at_ns)
