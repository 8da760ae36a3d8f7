"""Processes below agents that are followed and are no tool calls, under the role that each was last taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ....policies.events import BudgetReached, Event, ProcessesGone, RoleObserved
from ....policies.model import CgroupId, ProcessRole, ToolCallId
from .records import Records


@dataclass(slots=True)
class Helper:
    """A process that is followed and is no tool call."""

    fact: ProcessRole
    agent: ToolCallId | None
    """The record its parent belonged to."""


class Helpers:
    """By their records in the kernel."""

    def __init__(self, records: Records, now_ns: Callable[[], int]) -> None:
        self._records = records
        self._now_ns = now_ns
        self._known: dict[ToolCallId, Helper] = {}

    def get(self, record: ToolCallId | None) -> Helper | None:
        return self._known.get(record) if record is not None else None

    def all(self) -> list[tuple[ToolCallId, Helper]]:
        return list(self._known.items())

    def of(self, sandbox: CgroupId) -> list[Helper]:
        return [helper for helper in self._known.values() if helper.fact.sandbox == sandbox]

    def note(self, record: ToolCallId, fact: ProcessRole, agent: ToolCallId | None) -> None:
        """Follow it without telling anybody."""
        self._known[record] = Helper(fact, agent)

    def observe(self, record: ToolCallId, fact: ProcessRole, agent: ToolCallId | None = None) -> RoleObserved:
        known = self._known.get(record)
        self.note(record, fact, agent if agent is not None else (known.agent if known else None))
        return RoleObserved(self._now_ns(), fact)

    def drop(self, record: ToolCallId) -> Helper | None:
        return self._known.pop(record, None)

    def forget(self, sandbox: CgroupId) -> None:
        self._known = {record: h for record, h in self._known.items() if h.fact.sandbox != sandbox}

    def sift(self, event: Event, record: ToolCallId, helper: Helper) -> Iterable[Event]:
        """What the loop shall hear of an event of one of them."""
        match event:
            case BudgetReached():
                self._records.exempt(record)
            case ProcessesGone():
                del self._known[record]
                return (RoleObserved(event.at_ns, replace(helper.fact, gone=True)),)
            case _:
                pass
        return ()
