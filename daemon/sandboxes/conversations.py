"""Which conversation each call of a sandbox is of, where no engine of ours tells: some agents name it to their calls.

Owns what each runtime has named. A call whose environment could not be read (it was over, or is set only by a later
exec) is of the one conversation that its runtime has; of a runtime with several it stays unnamed.
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
    """Of one sandbox, by the record of the runtime."""

    def __init__(self) -> None:
        self._runtimes: dict[ToolCallId, _Runtime] = {}

    def forget(self, runtime: ToolCallId) -> None:
        self._runtimes.pop(runtime, None)

    def heard(
        self, at_ns: int, call: ToolCallId, runtime: ToolCallId, name: str | None, sandbox: Sandbox, state: State
    ) -> Iterator[ToolCallAttributed]:
        """A call has begun, or become another program, and is of the conversation `name`; None: it does not say."""
        kept = self._runtimes.setdefault(runtime, _Runtime())
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
