"""Execs and what they were ruled to be, as facts for the loop; and those on which the conversation's word may yet come.

Owns how long an exec waits for its witness, and which one a conversation can mean by its time. Rules on nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ....policies import roles
from ....policies.events import Event, ProcessesGone, ToolCallEnded, ToolCallStarted
from ....policies.model import NS_PER_S, CgroupId, ProcessRole, Role, ToolCallId
from ....policies.roles import Asked, Exec, Profile, Ruling

_LATE_NS = 5 * NS_PER_S
"""An exec that is so long ago waits for no witness any more."""
_LATE_COUNT = 256
LATER_COUNT = 4
"""Execs of one process that are kept."""
_BEHIND_NS = NS_PER_S // 4
"""So long after its line was answered a program may begin that the line put in the background."""


class Later(NamedTuple):
    """One more exec of a process."""

    command: str
    environment: Mapping[str, str]


@dataclass(slots=True)
class Ruled:
    """An exec that was ruled on without a word from the conversation, which may be on its way."""

    event: ToolCallStarted
    seen: Exec
    profile: Profile | None
    runtime: str
    ruling: Ruling
    since: list[Event]
    """Its end and its last process's, once they are known."""
    later: list[Later] = field(default_factory=list)
    """What it became since, where its own command line was cut short."""

    @property
    def cut(self) -> bool:
        return self.seen.command.endswith(roles.CUT)


class Unwitnessed:
    """Execs that were ruled on without the conversation's word, the oldest first."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[ToolCallId, Ruled] = OrderedDict()

    def wait(self, ruled: Ruled) -> None:
        """A line of a shell may wait as long as it runs: by its time it is known when its conversation goes on."""
        self._waiting[ruled.event.id] = ruled
        for each in list(self._waiting.values()):
            if each.event.at_ns >= ruled.event.at_ns - _LATE_NS:
                break
            if not (each.seen.in_shell and each.ruling.role is Role.TOOL_CALL):
                del self._waiting[each.event.id]
        while len(self._waiting) > _LATE_COUNT:
            self._waiting.popitem(last=False)

    def get(self, record: ToolCallId) -> Ruled | None:
        return self._waiting.get(record)

    def drop(self, record: ToolCallId) -> None:
        """Its word has come. Safe to repeat."""
        self._waiting.pop(record, None)

    def of(self, sandbox: CgroupId) -> list[Ruled]:
        return [ruled for ruled in self._waiting.values() if ruled.event.sandbox == sandbox]

    def note(self, event: ToolCallEnded | ProcessesGone) -> None:
        """What follows the start of one that waits."""
        if (ruled := self._waiting.get(event.id)) is not None:
            ruled.since.append(event)

    def forget(self, sandbox: CgroupId) -> None:
        for ruled in self.of(sandbox):
            del self._waiting[ruled.event.id]

    def in_time(self, sandbox: CgroupId, asked: Asked) -> Ruled | None:
        """The line of a shell, taken for a call, that began while this was asked for."""
        for ruled in self.of(sandbox):
            if ruled.seen.in_shell and ruled.ruling.role is Role.TOOL_CALL and asked.waits_at(ruled.event.at_ns):
                return ruled
        return None

    def left_behind(self, sandbox: CgroupId, asked: Asked) -> Ruled | None:
        """`make &` may be exec'd after its line was answered: what stands in the line as it is, and came soon after."""
        until_ns = (asked.answered_ns or 0) + _BEHIND_NS
        for ruled in self.of(sandbox):
            if not ruled.seen.in_shell or not asked.at_ns <= ruled.event.at_ns <= until_ns:
                continue
            if roles.of_line(ruled.seen.command, [asked]) is not None:
                return ruled
        return None


def fact_of(event: ToolCallStarted, seen: Exec, ruling: Ruling) -> ProcessRole:
    """Of an exec that is no call."""
    said = (ruling.role, ruling.confidence, ruling.why, event.at_ns)
    return ProcessRole(event.id, event.sandbox, event.pid or 0, seen.command, *said)


def as_call(event: ToolCallStarted, ruling: Ruling) -> ToolCallStarted:
    """Of one that is: what the loop hears of it."""
    return replace(
        event,
        command=ruling.command,
        confidence=ruling.confidence,
        session=ruling.session or event.session,
        call_id=ruling.call_id,
        exempt=not ruling.budgeted,
        soft_bytes=event.soft_bytes if ruling.budgeted else 0,
        hard_bytes=event.hard_bytes if ruling.budgeted else 0,
    )
