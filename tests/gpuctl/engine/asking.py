"""Asks a running engine for turns and waits for them, from a test's own thread."""

from __future__ import annotations

import queue
import time
from typing import Any

from equipoise.gpuctl.directives import Directive, Outcome
from equipoise.gpuctl.engine.engine import Engine
from equipoise.gpuctl.engine.schedule.sequence import (
    SessionId,
    TenantId,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRefused,
    TurnRequest,
)
from equipoise.gpuctl.reports import Reported

TIMEOUT_S = 300.0


class Asked:
    """One turn under way."""

    def __init__(self, engine: Engine, session: str, prompt: str, tokens: int, **request: Any) -> None:
        self._events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        self.id = engine.submit(
            TurnRequest(SessionId(session), TenantId("t"), prompt, max_tokens=tokens, **request), self._events.put
        )
        self.text = ""

    def wait_for_text(self) -> None:
        """Until the first text is there: the turn is being computed."""
        while not self.text:
            event = self._events.get(timeout=TIMEOUT_S)
            assert not isinstance(event, TurnFinished | TurnRefused), event
            if isinstance(event, TextDelta):
                self.text += event.text

    def finish(self) -> TurnFinished:
        while True:
            event = self._events.get(timeout=TIMEOUT_S)
            if isinstance(event, TextDelta):
                self.text += event.text
            if isinstance(event, TurnRefused):
                raise event.error
            if isinstance(event, TurnFinished):
                return event


class Watch:
    """Collects an engine's reports."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reports: queue.SimpleQueue[Reported] = queue.SimpleQueue()
        self.seen: list[Reported] = []
        engine.listen(self._reports.put)

    def direct(self, directive: Directive, *, final: bool = True) -> Outcome:
        """Give the directive and wait for its (final) outcome."""
        self._engine.direct(directive)
        while True:
            reported = self._reports.get(timeout=TIMEOUT_S)
            self.seen.append(reported)
            report = reported.report
            answers = isinstance(report, Outcome) and report.directive_id == directive.directive_id
            if answers and isinstance(report, Outcome) and (report.status.final or not final):
                return report


def soon() -> int:
    return time.monotonic_ns() + 10**10
