"""What is known of the host, as mutable fields, and the arms that give events their meaning.

Owns the fields, since most events touch more than one subject's, and how a call is found under an id it once had. It
gives no event a meaning: that is for the file of its subject.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..accounting import SessionCost
from ..actions import Decision
from ..correlate import Covariance
from ..estimate import Estimates
from ..events import Event, IntentDeclared
from ..model import (
    CgroupId,
    DecisionId,
    Engine,
    EngineId,
    Host,
    ProcessRole,
    Sandbox,
    Session,
    SessionId,
    TenantId,
    ToolCall,
    ToolCallId,
)
from ..policy import LadderRule, Policy


class Picture:
    """Tenants, sandboxes, tool calls, sessions and engines as they are known now.

    A name with a leading underscore is for the files of this package alone.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.host = Host()
        self.sandboxes: dict[CgroupId, Sandbox] = {}
        self.tool_calls: dict[ToolCallId, ToolCall] = {}
        self.processes: dict[ToolCallId, ProcessRole] = {}
        """What runs below the agents and is no tool call."""
        self.sessions: dict[SessionId, Session] = {}
        self.engines: dict[EngineId, Engine] = {}
        self.estimates = Estimates()
        self.covariance = Covariance()
        """Memory of all tool calls against KV on all devices, sampled with the host."""
        self.lost_count = 0
        self.late_count = 0
        """Events about something that is not, or no longer, known."""
        self._aliases: dict[ToolCallId, ToolCallId] = {}
        self._wrappers: set[ToolCallId] = set()
        """Aliases with processes of their own: what the kernel says of those is not about the call they wrap."""
        self._accrued_ns: dict[ToolCallId, int] = {}
        """Up to when each running call has been charged with its session's KV."""
        self._intents: dict[tuple[CgroupId, str], IntentDeclared] = {}
        self._decisions: dict[DecisionId, Decision] = {}
        self._weights: set[tuple[EngineId, TenantId, float]] = set()
        self._left_behind: set[SessionId] = set()
        self._early_costs: dict[SessionId, tuple[EngineId, SessionCost]] = {}
        """Of sessions whose turns ended before their engine's first picture of them."""
        self._joins: dict[SessionId, tuple[EngineId, CgroupId]] = {}
        """Where sessions' requests come from; of those, too, that their engine has not shown yet."""
        self._last_asked: dict[CgroupId, SessionId] = {}
        """Which of a sandbox's sessions last ended a turn by asking for a tool."""
        self._pressed: dict[LadderRule, int] = {}

    def resolve(self, tool_call: ToolCallId) -> ToolCallId:
        """The id under which a merged tool call is known now."""
        return self._aliases.get(tool_call, tool_call)

    def _known(self, tool_call: ToolCallId) -> ToolCall | None:
        """The call of that id; None is counted as late."""
        call = self.tool_calls.get(self.resolve(tool_call))
        if call is None:
            self.late_count += 1
        return call

    def _put(self, call: ToolCall) -> None:
        self.tool_calls[call.id] = call


E = TypeVar("E", bound=Event)
Arm = tuple[type, Callable[[Picture, Any], None]]
"""An event class and what such an event does to the picture. Any: of that class alone, which `arm` makes sure of."""


def arm(kind: type[E], does: Callable[[Picture, E], None]) -> Arm:
    """An arm of `State.apply`; the type checker refuses a function that is for another event."""
    return kind, does
