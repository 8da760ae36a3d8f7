"""What a tool call is doing as far as our own actions go, and since when.

Owns every change of phase and the sum of the time in which we held a call back. It knows neither events nor actions:
`tool_calls.py` and `outcomes.py` say which of them brings a change about.
"""

from __future__ import annotations

from dataclasses import replace

from ..model import STALLED, ToolCall, ToolCallId, ToolCallPhase
from .picture import Picture

_HELD_BACK = (ToolCallPhase.FROZEN, ToolCallPhase.THROTTLED)


def to_phase(call: ToolCall, phase: ToolCallPhase, at_ns: int) -> ToolCall:
    """The call in its new phase. Nothing follows the end, and nothing but the end follows a kill."""
    if call.phase is phase or not call.running:
        return call
    if call.phase is ToolCallPhase.KILLED and phase is not ToolCallPhase.ENDED:
        return call
    stalled = max(0, at_ns - call.phase_since_ns) if call.phase in STALLED else 0
    return replace(call, phase=phase, phase_since_ns=at_ns, stalled_ns=call.stalled_ns + stalled, waiting_until_ns=None)


def hold_back(picture: Picture, tool_call: ToolCallId, phase: ToolCallPhase, at_ns: int) -> None:
    """Throttled or frozen, unless the kernel has stopped it meanwhile: only a stopped call is answered."""
    call = picture._known(tool_call)
    if call is not None and call.phase in (ToolCallPhase.RUNNING, *_HELD_BACK):
        picture._put(to_phase(call, phase, at_ns))


def let_go(picture: Picture, tool_call: ToolCallId, at_ns: int) -> None:
    call = picture._known(tool_call)
    if call is not None and call.phase in _HELD_BACK:
        picture._put(to_phase(call, ToolCallPhase.RUNNING, at_ns))


def answered(picture: Picture, tool_call: ToolCallId, phase: ToolCallPhase, at_ns: int) -> None:
    """A call that stood at its budget was granted more, or ended."""
    if call := picture._known(tool_call):
        picture._put(replace(to_phase(call, phase, at_ns), stopped_ns=None, waiting_until_ns=None))
