"""What the kernel tells of a tool call beside its life and its memory: kept with the call, as people are shown it.

Takes every class below ToolCallFact alike, so that a new one needs nothing here. They take no part in any decision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from ..events import Event, ToolCallFact
from ..model import Fact
from .picture import Picture, arm


def _told(picture: Picture, event: ToolCallFact) -> None:
    # A wrapper's own end is not that of the call it was merged into.
    if event.id not in picture._wrappers and (call := picture._known(event.id)):
        kind = type(event).__name__
        others = tuple(fact for fact in call.facts if fact.kind != kind)
        picture._put(replace(call, facts=(*others, Fact(kind, event.at_ns, event.words))))


ARMS = tuple(arm(kind, _told) for kind in get_args(Event) if issubclass(kind, ToolCallFact))
