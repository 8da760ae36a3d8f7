"""The door: how many conversations are awake, so that what they need together fits device and host tier.

Owns who is held and who is let go on. Source of the idea: Denning, "The working set model for program behavior" (CACM
1968): one more is let in only where its working set fits beside those of the others, else all of them thrash. Only a
session whose KV is on disk or gone is held: it would push out another to come back. Who has
waited longest, by weight, is let go on first; nobody is held for longer than `KvPolicy.door_longest_ns` after asking,
so that under lasting overload the awake change in turn.

An engine lets a conversation that it sees for the first time begin before anybody is asked: the door closes behind it,
for those that it pushed out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model import Engine, KvTier, Session, SessionId, SessionPhase
from .policy import Policy
from .snapshot import Snapshot

_OUT = (KvTier.DISK, KvTier.NONE)
GROWTH = 1.2
"""A session is reckoned with a fifth more than its context: some eight turns of the recorded agents."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One session that is to be held, held for longer, or let go on."""

    session: Session
    hold: bool
    need_tokens: float
    """Of all that would be awake with it."""
    room_tokens: float
    why: str


_WHERE = {KvTier.DISK: "on disk", KvTier.NONE: "gone"}


def watch(snapshot: Snapshot, policy: Policy, engine: Engine) -> list[Passage]:
    """What to do at the door of this engine now; nothing where the policy has none or the engine can not hold."""
    ratio = policy.kv.door_ratio
    if ratio is None or not {"hold", "release"} <= engine.supported_directives:
        return []
    room = ratio * (engine.device_capacity_tokens + engine.host_capacity_bytes / max(1, engine.bytes_per_token))
    in_call = {call.session for call in snapshot.tool_calls if call.running}
    here = [s for s in snapshot.sessions if s.engine == engine.id and s.id not in snapshot.left_behind]
    held = [s for s in here if s.hold_until_ns > snapshot.now_ns]
    awake = [s for s in here if s.hold_until_ns <= snapshot.now_ns and _is_awake(s, in_call)]
    need = sum(map(_need, awake))
    passages = []
    lost = [s for s in awake if s.tier in _OUT and s.phase in (SessionPhase.IDLE, SessionPhase.WAITING)]
    for session in sorted(lost, key=lambda s: (_waited(s, snapshot), s.id)):  # who came last is held first
        if need > room and len(awake) > 1 and not _too_long(session, snapshot, policy):
            passages.append(
                Passage(session, True, need, room, f"its KV is {_WHERE[session.tier]} and the awake need all the room")
            )
            need -= _need(session)
            awake.remove(session)
    for session in sorted(held, key=lambda s: (-_waited(s, snapshot), s.id)):
        if _too_long(session, snapshot, policy):
            why = f"it has been held for the longest that the policy allows, {policy.kv.door_longest_ns / 1e9:g} s"
        elif not awake or need + _need(session) <= room:
            why = "the awake leave it room"
        else:
            if session.hold_until_ns - snapshot.now_ns < policy.kv.retain_ns // 2:
                passages.append(Passage(session, True, need + _need(session), room, "the awake still need the room"))
            continue
        need += _need(session)
        awake.append(session)
        passages.append(Passage(session, False, need, room, why))
    return passages


def _is_awake(session: Session, in_call: set[SessionId]) -> bool:
    if session.phase is SessionPhase.IDLE:
        return bool(session.held_tokens) or session.id in in_call
    return True


def _need(session: Session) -> float:
    return GROWTH * session.context_tokens


def _waited(session: Session, snapshot: Snapshot) -> float:
    """Seconds since its turn was asked for, by weight; 0 while its agent is not back."""
    if session.phase not in (SessionPhase.WAITING, SessionPhase.HELD):
        return 0.0
    return snapshot.weight(session.tenant) * (snapshot.now_ns - session.asked_ns) / 1e9


def _too_long(session: Session, snapshot: Snapshot, policy: Policy) -> bool:
    asked = session.phase in (SessionPhase.WAITING, SessionPhase.HELD)
    return asked and snapshot.now_ns - session.asked_ns >= policy.kv.door_longest_ns
