"""The KV that sessions hold, charged to the tool calls that run meanwhile.

Owns up to when each running call has been charged. Whoever changes what a session holds, or ends a call, charges first:
what was held until then would otherwise be lost. How much a stretch of time costs is for `correlate.py`.
"""

from __future__ import annotations

from dataclasses import replace

from ..correlate import held_bytes, meanwhile
from ..model import KvMeanwhile, ToolCall
from .picture import Picture


def accrue(picture: Picture, call: ToolCall, to_ns: int) -> None:
    """Charge the call with the KV its session held since it was last charged."""
    session = picture.sessions.get(call.session)
    from_ns = picture._accrued_ns.get(call.id, to_ns)
    picture._accrued_ns[call.id] = max(from_ns, to_ns)
    if session is not None:
        kv = meanwhile(call.kv, session, picture.engines[session.engine], from_ns, to_ns)
        picture._put(replace(call, kv=kv))


def accrue_all(picture: Picture, to_ns: int) -> None:
    for call in [c for c in picture.tool_calls.values() if c.running]:
        accrue(picture, call, to_ns)


def kv_at_peak(picture: Picture, call: ToolCall) -> KvMeanwhile:
    """The call's KV figures, with what its session holds now as what was held at its peak."""
    session = picture.sessions.get(call.session)
    held = held_bytes(session, picture.engines[session.engine]) if session else 0
    return replace(call.kv, at_peak_bytes=held)
