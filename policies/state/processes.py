"""Processes below an agent that are no tool calls, under the role they are taken for; and connections.

They take no part in any decision: they are here to be shown, and so that nobody takes them for calls.
"""

from __future__ import annotations

from ..events import ConnectionOpened, ProcessExeced, RoleObserved
from .picture import Picture, arm


def _role_observed(picture: Picture, event: RoleObserved) -> None:
    fact = event.process
    if fact.gone or fact.sandbox not in picture.sandboxes:
        picture.processes.pop(fact.id, None)
    else:
        picture.processes[fact.id] = fact


def _connection_opened(picture: Picture, event: ConnectionOpened) -> None:
    """Whose it is was said to whoever asks (sandboxes/roles.py): the picture keeps no connections."""


def _process_execed(picture: Picture, event: ProcessExeced) -> None:
    """What it means is said by a ToolCallAttributed, where it means anything."""


ARMS = (
    arm(RoleObserved, _role_observed),
    arm(ConnectionOpened, _connection_opened),
    arm(ProcessExeced, _process_execed),
)
