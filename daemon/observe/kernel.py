"""What the kernel's probes report, as events for the loop.

Owns the draining of the ring, the heartbeat, and saying what was lost: a line when losses begin and one when they are
over. What each process is taken for is said by `sift`: it answers what the loop shall hear of an event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ...ebpf.tool_memory import ToolMemory
from ...policies.events import Event, EventsLost, ToolCallMemoryStepped
from ...policies.model import NS_PER_S, ToolCallId
from .. import log

QUIET_NS = 5 * NS_PER_S
"""Without a loss for so long, a burst of them is over."""


class KernelEvents:
    """Over the probes; without them (None) everything here is a safe no-op."""

    def __init__(
        self,
        probes: ToolMemory | None,
        emit: Callable[[Event], None],
        now_ns: Callable[[], int],
        sift: Callable[[Event], Iterable[Event]] = lambda event: (event,),
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_loss()`: events were lost; whoever learns from them looks for himself."""
        self._probes = probes
        self._on_loss = on_loss
        self._burst: Counter[str] = Counter()
        """What was lost since the burst that goes on began, by source."""
        self._lost_ns = 0
        self._sift = sift
        self._emit = emit
        self._now_ns = now_ns

    @property
    def lost_count(self) -> int:
        """Records that found the ring full."""
        return self._probes.losses().events_count if self._probes is not None else 0

    def losses(self) -> dict[str, int]:
        """All that was lost or could not be followed since the start, by source; nothing is an empty mapping."""
        return self._probes.losses().by_source() if self._probes is not None else {}

    @property
    def unrecorded_count(self) -> int:
        """Tool calls that run now and are known to nobody, since there is no record for them."""
        return self._probes.unrecorded_count if self._probes is not None else 0

    def drain(self) -> None:
        """Take in what the kernel reports."""
        if self._probes is None:
            return
        events = self._probes.drain()
        self._say_losses(events)
        for event in events:
            for told in self._sift(event):
                self._emit(told)

    def _say_losses(self, events: Iterable[Event]) -> None:
        now_ns = self._now_ns()
        began = not self._burst
        for event in events:
            if isinstance(event, EventsLost):
                self._burst[event.source] += event.count
                self._lost_ns = now_ns
        if not self._burst:
            return
        if began:
            log.warning("events_lost", what=_text(self._burst), then="the kernel's books are looked through")
        if self._lost_ns == now_ns:
            self._on_loss()
        if now_ns - self._lost_ns >= QUIET_NS:
            unrecorded = self.unrecorded_count
            log.warning("events_lost_in_all", what=_text(self._burst), calls_without_record=unrecorded)
            self._burst.clear()

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


def _text(lost: Counter[str]) -> str:
    return ", ".join(f"{count} x {source}" for source, count in sorted(lost.items()))
