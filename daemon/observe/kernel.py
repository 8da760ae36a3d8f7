"""What the kernel's probes report, as events for the loop.

Owns the draining of the ring, the resynchronising after a loss, and the heartbeat. What each process is taken for is
said by `sift`: it answers what the loop shall hear of an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...ebpf.tool_memory import ToolMemory
from ...policies.events import Event, EventsLost, ToolCallMemoryStepped
from ...policies.model import ToolCallId
from .. import log


class KernelEvents:
    """Over the probes; without them (None) everything here is a safe no-op."""

    def __init__(
        self,
        probes: ToolMemory | None,
        emit: Callable[[Event], None],
        now_ns: Callable[[], int],
        sift: Callable[[Event], Iterable[Event]] = lambda event: (event,),
    ) -> None:
        self._probes = probes
        self._sift = sift
        self._emit = emit
        self._now_ns = now_ns

    @property
    def lost_count(self) -> int:
        """Records that found the ring full."""
        return self._probes.losses().events_count if self._probes is not None else 0

    def drain(self) -> None:
        """Take in what the kernel reports."""
        if self._probes is None:
            return
        events = self._probes.drain()
        if any(isinstance(event, EventsLost) for event in events):
            events += self._probes.resync()
        for event in events:
            try:
                for told in self._sift(event):
                    self._emit(told)
            except Exception as error:  # of one event: what came with it is not lost for that
                log.warning("event_failed", kind=type(event).__name__, error=repr(error))

    def beat(self) -> None:
        """At each turn of the loop: the kernel stops nobody without it."""
        if self._probes is not None:
            self._probes.beat()
            self.drain()  # memory steps wake nobody by themselves

    def read_usage(self, tool_call: ToolCallId) -> None:
        """What a call uses before something is done to it: a stopped one may have grown until all of it stood still."""
        usage = self._probes.usage(tool_call) if self._probes is not None else None
        if usage is not None:
            self._emit(ToolCallMemoryStepped(self._now_ns(), tool_call, usage.used_bytes, usage.peak_bytes))
