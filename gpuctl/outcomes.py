"""Remembers how directives ended, so that a repeated one is answered and not applied again.

Owns: the newest outcome of each directive, for as many as are likely to be repeated. Must not: apply or report. For one
thread.
"""

from __future__ import annotations

from .directives import Outcome

REMEMBERED_COUNT = 4096


class Outcomes:
    def __init__(self, remembered_count: int = REMEMBERED_COUNT) -> None:
        """Past `remembered_count` directives, the one first heard of is forgotten."""
        self._remembered_count = remembered_count
        self._outcomes: dict[str, Outcome] = {}

    def note(self, outcome: Outcome) -> None:
        """The newest outcome of a directive answers its repetition."""
        self._outcomes[outcome.directive_id] = outcome
        if len(self._outcomes) > self._remembered_count:
            del self._outcomes[next(iter(self._outcomes))]

    def of(self, directive_id: str) -> Outcome | None:
        """What became of a directive seen before; None for a new one."""
        return self._outcomes.get(directive_id)
