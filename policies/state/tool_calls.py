"""Tool calls: their life from the first word of them to the last process, who says what they are, their memory.

Owns `tool_calls`, the ids and wrappers of those that were merged, the intents that no call has used yet, and what is
learned of each kind of command. What our own actions do to a call is for `outcomes.py`; how it changes phase, for
`phases.py`.
"""

from __future__ import annotations

from dataclasses import replace

from ..estimate import command_kind
from ..events import (
    BudgetChanged,
    BudgetLevel,
    BudgetReached,
    IntentDeclared,
    ProcessesGone,
    ToolCallAttributed,
    ToolCallEnded,
    ToolCallJoined,
    ToolCallLeft,
    ToolCallMemoryStepped,
    ToolCallMerged,
    ToolCallStarted,
    ToolCallWithdrawn,
)
from ..model import ToolCall, ToolCallPhase, ToolCallSource, Verdict
from .charges import accrue, kv_at_peak
from .joins import session_of
from .phases import answered, to_phase
from .picture import Picture, arm

_RANK = {ToolCallSource.LINEAGE: 0, ToolCallSource.HOOK: 1, ToolCallSource.WRAPPER: 2}


def _intent_declared(picture: Picture, event: IntentDeclared) -> None:
    picture._intents[(event.sandbox, event.kind)] = event


def _started(picture: Picture, event: ToolCallStarted) -> None:
    sandbox = picture.sandboxes.get(event.sandbox)
    if sandbox is None:
        picture.late_count += 1
        return
    if picture.resolve(event.id) in picture.tool_calls:
        return  # told twice; the first stands
    if event.earlier is not None:
        _goes_on(picture, event, event.earlier)
        return
    kind = command_kind(event.command)
    intent = picture._intents.pop((event.sandbox, kind), None)
    picture._accrued_ns[event.id] = event.at_ns
    picture._put(
        ToolCall(
            id=event.id,
            tenant=sandbox.tenant,
            sandbox=event.sandbox,
            session=event.session or session_of(picture, sandbox),
            command=event.command,
            kind=kind,
            source=event.source,
            confidence=event.confidence,
            start_ns=event.at_ns,
            pid=event.pid,
            phase_since_ns=event.at_ns,
            soft_bytes=event.soft_bytes,
            hard_bytes=event.hard_bytes,
            agent=event.agent,
            call_id=event.call_id,
            exempt=event.exempt,
            expected_bytes=intent.expected_bytes if intent else None,
            expected_ns=intent.expected_ns if intent else None,
        )
    )


def _goes_on(picture: Picture, event: ToolCallStarted, earlier: ToolCall) -> None:
    """Nobody is held back at a daemon's start, and what it uses is measured anew."""
    picture._accrued_ns[event.id] = event.at_ns
    picture._put(
        replace(
            earlier,
            phase=ToolCallPhase.RUNNING if earlier.end_ns is None else ToolCallPhase.ENDED,
            phase_since_ns=event.at_ns,
            used_bytes=0,
            soft_bytes=event.soft_bytes,
            hard_bytes=event.hard_bytes,
            agent=None,
            gone_ns=None,
            stopped_ns=None,
            waiting_until_ns=None,
        )
    )


def _attributed(picture: Picture, event: ToolCallAttributed) -> None:
    call = picture._known(event.id)
    if call is None or _RANK[event.source] < _RANK[call.source]:
        return
    command = event.command or call.command
    picture._put(
        replace(
            call,
            source=event.source,
            confidence=max(call.confidence, event.confidence),
            command=command,
            kind=command_kind(command),
            session=event.session or call.session,
            call_id=event.call_id or call.call_id,
            exempt=event.exempt or call.exempt,
        )
    )


def _withdrawn(picture: Picture, event: ToolCallWithdrawn) -> None:
    if picture.tool_calls.pop(event.id, None) is not None:
        picture._accrued_ns.pop(event.id, None)
        picture._aliases = {alias: to for alias, to in picture._aliases.items() if to != event.id}
        picture._wrappers &= picture._aliases.keys()


def _merged(picture: Picture, event: ToolCallMerged) -> None:
    announced, seen = picture._known(event.id), picture._known(event.into)
    if announced is None or seen is None or announced.id == seen.id:
        return
    told = announced if _RANK[announced.source] >= _RANK[seen.source] else seen
    # KV is charged from the earlier start on, to the session of whoever knows it best.
    first = announced if announced.start_ns <= seen.start_ns else seen
    charged = first if first.session == told.session else told
    charged_ns = picture._accrued_ns.get(charged.id, charged.start_ns)
    picture._accrued_ns.pop(announced.id, None)
    if seen.running:
        picture._accrued_ns[seen.id] = charged_ns
    del picture.tool_calls[announced.id]
    picture._aliases[announced.id] = seen.id
    for alias, target in picture._aliases.items():
        if target == announced.id:
            picture._aliases[alias] = seen.id
    if announced.pid is not None:
        picture._wrappers.add(announced.id)
    picture._put(
        replace(
            seen,
            source=told.source,
            confidence=max(seen.confidence, announced.confidence),
            command=told.command,
            kind=told.kind,
            session=told.session,
            start_ns=first.start_ns,
            kv=charged.kv,
            verdict=charged.verdict,
            call_id=seen.call_id or announced.call_id,
            expected_bytes=told.expected_bytes or seen.expected_bytes,
            expected_ns=told.expected_ns or seen.expected_ns,
        )
    )


def _joined(picture: Picture, event: ToolCallJoined) -> None:
    """What a call that is over has put in the background begins late: it has left that behind."""
    call = picture._known(event.id)
    if call is not None and call.gone_ns is not None:
        picture._put(replace(call, gone_ns=None, escaped_count=max(1, call.escaped_count)))


def _left(picture: Picture, event: ToolCallLeft) -> None:
    """For whoever keeps its processes together (sandboxes/tool_calls.py): the picture knows none of them."""


def _memory_stepped(picture: Picture, event: ToolCallMemoryStepped) -> None:
    if event.id in picture._wrappers:
        return  # a wrapper's own few MiB: its call is measured under the id it was merged into
    call = picture._known(event.id)
    if call is None:
        return
    peak_bytes = max(call.peak_bytes, event.peak_bytes, event.used_bytes)
    if peak_bytes > call.peak_bytes:
        call = replace(call, peak_bytes=peak_bytes, peak_ns=event.at_ns, kv=kv_at_peak(picture, call))
    if call.stopped_ns is not None and call.hard_bytes:
        # Its other threads and processes ran on until the stop reached them.
        overshoot = max(call.overshoot_bytes or 0, event.used_bytes - call.hard_bytes)
        call = replace(call, overshoot_bytes=overshoot)
    picture._put(replace(call, used_bytes=event.used_bytes if call.gone_ns is None else 0))


def _budget_reached(picture: Picture, event: BudgetReached) -> None:
    if event.id in picture._wrappers:
        return
    _memory_stepped(picture, ToolCallMemoryStepped(event.at_ns, event.id, event.used_bytes, event.used_bytes))
    call = picture.tool_calls.get(picture.resolve(event.id))
    if call is None or event.level is not BudgetLevel.HARD:
        return
    if call.phase is ToolCallPhase.KILLED or call.gone_ns is not None:
        return
    overshoot = max(0, event.used_bytes - event.budget_bytes)
    call = replace(
        call,
        overshoot_bytes=max(overshoot, call.overshoot_bytes or 0),
        hard_bytes=call.hard_bytes or event.budget_bytes,
        stopped_ns=call.stopped_ns if call.stopped_ns is not None else event.at_ns,
    )
    # An escapee can reach the budget after its call has ended: it is stopped all the same, the call stays ended.
    picture._put(to_phase(call, ToolCallPhase.STOPPED, event.at_ns))


def _budget_changed(picture: Picture, event: BudgetChanged) -> None:
    # A wrapper's own budget is not that of the call it was merged into.
    if event.id not in picture._wrappers and (call := picture._known(event.id)):
        picture._put(replace(call, soft_bytes=event.soft_bytes, hard_bytes=event.hard_bytes))
        if not event.hard_bytes and call.stopped_ns is not None:
            answered(picture, call.id, ToolCallPhase.RUNNING, event.at_ns)


def _ended(picture: Picture, event: ToolCallEnded) -> None:
    if event.id in picture._wrappers:
        return
    call = picture._known(event.id)
    if call is None:
        return
    if not call.running:
        if call.exit_code is None and call.signal is None:  # somebody saw it gone; how it ended is told now
            picture._put(replace(call, exit_code=event.exit_code, signal=event.signal))
        return
    accrue(picture, call, event.at_ns)
    picture._accrued_ns.pop(call.id, None)
    call = picture.tool_calls[call.id]
    peak_bytes = max(call.peak_bytes, event.peak_bytes or 0)
    end_ns = max(event.at_ns, call.start_ns)
    was_killed = call.phase is ToolCallPhase.KILLED
    gone_ns = call.gone_ns if event.escaped_count or call.gone_ns is not None else end_ns
    if not call.peak_ns:  # too short for a step: the end is when its peak was seen
        call = replace(call, peak_ns=end_ns, kv=kv_at_peak(picture, call))
    if call.verdict is None and call.kv.held_bytes:
        call = replace(call, verdict=Verdict.KEEP)  # nothing was asked of the engine: it kept what it held
    call = to_phase(call, ToolCallPhase.ENDED, end_ns)
    picture._put(
        replace(
            call,
            end_ns=end_ns,
            peak_bytes=peak_bytes,
            exit_code=event.exit_code,
            signal=event.signal,
            escaped_count=event.escaped_count,
            gone_ns=gone_ns,
            used_bytes=call.used_bytes if gone_ns is None else 0,
            stopped_ns=call.stopped_ns if gone_ns is None else None,
        )
    )
    if not was_killed:  # a killed call says how long it was let live, not how long it would have taken
        worked_ns = max(1, end_ns - call.start_ns - call.stalled_ns)
        picture.estimates = picture.estimates.observe(call.kind, worked_ns, peak_bytes)


def _processes_gone(picture: Picture, event: ProcessesGone) -> None:
    if event.id not in picture._wrappers and (call := picture._known(event.id)):
        picture._put(replace(call, gone_ns=event.at_ns, used_bytes=0, stopped_ns=None))


def forget(picture: Picture, before_ns: int) -> None:
    """Drop the calls whose last process was gone before `before_ns`, and the ids that meant them."""
    old = [
        c.id
        for c in picture.tool_calls.values()
        if c.gone_ns is not None and c.end_ns is not None and max(c.gone_ns, c.end_ns) < before_ns
    ]
    for key in old:
        del picture.tool_calls[key]
        picture._accrued_ns.pop(key, None)
    if old:
        picture._aliases = {alias: to for alias, to in picture._aliases.items() if to in picture.tool_calls}
        picture._wrappers &= picture._aliases.keys()


def check(picture: Picture) -> None:
    """Raise AssertionError where an invariant of tool calls is broken."""
    for alias, target in picture._aliases.items():
        assert target not in picture._aliases, f"alias {alias:x} points at an alias"
    for call in picture.tool_calls.values():
        assert call.peak_bytes >= call.used_bytes, f"{call.id:x}: peak below use"
        assert (call.end_ns is not None) == (call.phase is ToolCallPhase.ENDED), f"{call.id:x}: phase, end"
        assert call.end_ns is None or call.end_ns >= call.start_ns, f"{call.id:x}: ends before it starts"
        assert call.gone_ns is None or call.used_bytes == 0, f"{call.id:x}: gone and uses memory"
        if call.phase is ToolCallPhase.STOPPED and call.gone_ns is None:
            assert call.stopped_ns is not None, f"{call.id:x}: stopped, but not since when"


ARMS = (
    arm(ToolCallStarted, _started),
    arm(ToolCallAttributed, _attributed),
    arm(ToolCallJoined, _joined),
    arm(ToolCallLeft, _left),
    arm(ToolCallWithdrawn, _withdrawn),
    arm(ToolCallMerged, _merged),
    arm(ToolCallMemoryStepped, _memory_stepped),
    arm(BudgetReached, _budget_reached),
    arm(BudgetChanged, _budget_changed),
    arm(ToolCallEnded, _ended),
    arm(ProcessesGone, _processes_gone),
    arm(IntentDeclared, _intent_declared),
)
