"""Which sandbox a session belongs to, as its connections show rather than as its agent says.

Owns the joins, those of sessions that their engine has not shown yet included, and which session of a sandbox last
asked for a tool. Who is at the other end of a connection is found outside (daemon/observe/joins.py).
"""

from __future__ import annotations

from dataclasses import replace

from ..events import SessionJoined
from ..model import CgroupId, EngineId, FinishReason, Sandbox, Session, SessionId
from .picture import Picture, arm


def _joined(picture: Picture, event: SessionJoined) -> None:
    if event.sandbox not in picture.sandboxes:
        picture.late_count += 1
        return
    picture._joins[event.session] = (event.engine, event.sandbox)
    if session := picture.sessions.get(event.session):
        picture.sessions[session.id] = replace(session, sandbox=sandbox_of(picture, session))


def sandbox_of(picture: Picture, session: Session) -> CgroupId | None:
    """The sandbox it is joined to. One of another tenant does not count: an API key says more than a connection."""
    _, joined = picture._joins.get(session.id, (session.engine, None))
    sandbox = picture.sandboxes.get(joined) if joined is not None else None
    return joined if sandbox is not None and sandbox.tenant == session.tenant else None


def session_of(picture: Picture, sandbox: Sandbox) -> SessionId:
    """The session that a tool call of the sandbox is most likely of: its own by name where an engine has it; else the
    one that last asked for a tool; else the only one it has. Where that leaves none, its own by name."""
    if sandbox.session in picture.sessions:
        return sandbox.session
    if (asked := picture._last_asked.get(sandbox.cgroup_id)) is not None and _of(picture, asked, sandbox):
        return asked
    live = [session for session in picture._joins if _of(picture, session, sandbox)]
    return live[0] if len(live) == 1 else sandbox.session


def _of(picture: Picture, session_id: SessionId, sandbox: Sandbox) -> bool:
    _, joined = picture._joins.get(session_id, (None, None))
    session = picture.sessions.get(session_id)
    return joined == sandbox.cgroup_id and (session is None or session.tenant == sandbox.tenant)


def turn_ended(picture: Picture, session: SessionId, reason: FinishReason) -> None:
    if reason is FinishReason.TOOL_CALLS and session in picture._joins:
        picture._last_asked[picture._joins[session][1]] = session


def forget_engine(picture: Picture, engine: EngineId) -> None:
    """Forget the joins of its sessions that are not, or no longer, in the picture."""
    gone = {key for key, (of, _) in picture._joins.items() if of == engine and key not in picture.sessions}
    for key in gone:
        del picture._joins[key]
    picture._last_asked = {key: session for key, session in picture._last_asked.items() if session not in gone}


def sandbox_changed(picture: Picture, cgroup_id: CgroupId) -> None:
    """It was registered, or is gone; then its joins are forgotten."""
    joined = [key for key, (_, sandbox) in picture._joins.items() if sandbox == cgroup_id]
    if cgroup_id not in picture.sandboxes:
        picture._last_asked.pop(cgroup_id, None)
        for key in joined:
            del picture._joins[key]
    for session in [picture.sessions[key] for key in joined if key in picture.sessions]:
        picture.sessions[session.id] = replace(session, sandbox=sandbox_of(picture, session))


def check(picture: Picture) -> None:
    """Raise AssertionError where an invariant of joins is broken."""
    for session in picture.sessions.values():
        assert session.sandbox == sandbox_of(picture, session), f"{session.id}: its sandbox is not the one it joined"
    for cgroup_id, session_id in picture._last_asked.items():
        assert cgroup_id in picture.sandboxes, f"{session_id}: asked for a tool in a sandbox that is gone"
        assert session_id in picture._joins, f"{session_id}: asked for a tool, and is forgotten"


ARMS = (arm(SessionJoined, _joined),)
