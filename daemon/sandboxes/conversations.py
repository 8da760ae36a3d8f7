"""Which conversation each call of a sandbox is of, where no engine of ours tells: some agents name it to their calls.

Owns what each runtime has named. A call whose environment could not be read (it was over, or is set only by a later
exec) is of the one conversation that its runtime has; of a runtime with several it stays unnamed.

Agents that name none (Gemini CLI, opencode, most of one's own) are told apart by their processes: the first of a
sandbox has the sandbox's own session, each other one a session called by its process, "gold/ada:1234". A process that
holds several such conversations has one session: nothing tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...policies.events import ToolCallAttributed
from ...policies.model import Sandbox, SessionId, ToolCallId, ToolCallSource, tenants_session
from ...policies.state import State

_MOST_UNNAMED = 64


@dataclass(slots=True)
class _Runtime:
    names: set[str] = field(default_factory=set)
    unnamed: list[ToolCallId] = field(default_factory=list)


class Conversations:
    """Of one sandbox, by the process of the runtime: calls from before and after it first spoke name other parents."""

    def __init__(self) -> None:
        self._runtimes: dict[int, _Runtime] = {}
        self._first_pid: int | None = None
        """The runtime whose calls have the sandbox's own session; kept past its end, for the next is another one."""

    def forget(self, pid: int) -> None:
        self._runtimes.pop(pid, None)

    def of_process(self, pid: int, sandbox: Sandbox, state: State) -> SessionId | None:
        """The session of a runtime that names none; None: the sandbox's own, or what an engine tells."""
        if self._first_pid is None:
            self._first_pid = pid
        return None if pid == self._first_pid else session_named(f"{sandbox.name}:{pid}", sandbox, state)

    def heard(
        self, at_ns: int, call: ToolCallId, pid: int, name: str | None, sandbox: Sandbox, state: State
    ) -> Iterator[ToolCallAttributed]:
        """A call has begun, or become another program, and is of the conversation `name`; None: it does not say."""
        kept = self._runtimes.setdefault(pid, _Runtime())
        if name:
            kept.names.add(name)
        elif call not in kept.unnamed:
            kept.unnamed = [*kept.unnamed[1 - _MOST_UNNAMED :], call]
        calls = [call] if name else []
        if len(kept.names) == 1:
            name = next(iter(kept.names))
            calls += kept.unnamed
            kept.unnamed.clear()
        session = session_named(name, sandbox, state) if name else None
        if session is not None:
            for each in dict.fromkeys(calls):
                yield ToolCallAttributed(at_ns, each, ToolCallSource.LINEAGE, 0.0, session=session)


def session_named(name: str, sandbox: Sandbox, state: State) -> SessionId | None:
    """The session of a conversation that the agent calls so. None where an engine has others of the sandbox."""
    session = tenants_session(sandbox.tenant, name)
    told = any(known.sandbox == sandbox.cgroup_id for known in state.sessions.values())
    return session if session in state.sessions or not told else None
