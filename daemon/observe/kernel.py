"""What the kernel's probes report, as events for the loop.

Owns the draining of the ring, the resynchronising after a loss, and the heartbeat. Leaves out what is about the hooks
that our own integrations install: they are no tool calls.
"""

from __future__ import annotations

from collections.abc import Callable

from ...ebpf.tool_memory import ToolMemory
from ...policies.events import Event, EventsLost, ProcessesGone, ToolCallMemoryStepped, ToolCallStarted
from ...policies.model import ToolCallId

HOOK_MODULES = "equipoise.integrations."
"""In the command line of every hook that our integrations install."""


class KernelEvents:
    """Over the probes; without them (None) everything here is a safe no-op."""

    def __init__(self, probes: ToolMemory | None, emit: Callable[[Event], None], now_ns: Callable[[], int]) -> None:
        self._probes = probes
        self._emit = emit
        self._now_ns = now_ns
        self._own_hooks: set[ToolCallId] = set()

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
            if not self._is_own_hook(event):
                self._emit(event)

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

    def _is_own_hook(self, event: Event) -> bool:
        """Whether it is about a hook of ours that an agent ran: it must not be taken for the call it announces."""
        call = getattr(event, "id", None)
        if isinstance(event, ToolCallStarted) and HOOK_MODULES in event.command:
            self._own_hooks.add(event.id)
        if call not in self._own_hooks:
            return False
        if isinstance(event, ProcessesGone):
            self._own_hooks.discard(event.id)
        return True
