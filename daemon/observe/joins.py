"""Who is at the other end of an engine's connection: the kernel saw who opened it.

Owns the connections that sandboxes opened lately, and whose the peers are that engines asked about. Answers an engine,
and tells the loop which sandbox a session's turn came from. An agent has no part in it.

The engine sees an address and a port. They name a connection only together with its network namespace and its time, and
who may make namespaces can make the same address and port in one of its own. So:

- the connection must lead to where the engine listens;
- it must have been established shortly before the engine accepted it: a port is used again;
- one in the engine's own namespace goes before all others, which a loopback address must be in;
- two sandboxes in two other namespaces that both could be meant are nobody.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ...gpuctl.peers import local_pid
from ...policies.events import ConnectionOpened, EngineDetached, Event, SessionJoined, TurnStarted
from ...policies.model import Engine, EngineId, Sandbox
from ...policies.state import State
from ..sandboxes.processes import network_namespace
from ..sandboxes.witness import Owner

REMEMBERED_COUNT = 16_384
"""Connections, and peers of engines; past it the oldest are forgotten."""
NAMESAKES_COUNT = 64
"""Connections with the same address and port, in different namespaces."""
ACCEPTED_WITHIN_NS = 10_000_000_000
"""From a connection's being established to its being accepted: as long as an engine may be too busy to accept."""
CLOCK_SLACK_NS = 100_000_000
"""The engine may accept before our program runs: the handshake's last packet is under way meanwhile."""


@dataclass(frozen=True, slots=True)
class _Opened:
    at_ns: int
    owner: Owner
    remote_address: str
    remote_port: int


class Joins:
    """`opened` takes what the kernel saw, `who` answers engines. Also a sink of the loop: `joins(event, state)`."""

    def __init__(
        self,
        state: State,
        drain: Callable[[], None],
        emit: Callable[[Event], None],
        namespace_of: Callable[[int], int | None] = network_namespace,
        sandbox_of: Callable[[int], Sandbox | None] = lambda pid: None,
    ) -> None:
        """`drain` takes in what waits in the kernel's buffer, by way of `opened`. `sandbox_of(pid)`: where it runs."""
        self._sandbox_of = sandbox_of
        self._state = state
        self._drain = drain
        self._emit = emit
        self._namespace_of = namespace_of
        self._opened: OrderedDict[tuple[str, int], dict[int, _Opened]] = OrderedDict()
        """By the local end, then by network namespace. The newest of each."""
        self._peers: OrderedDict[tuple[EngineId, str, int], Owner | None] = OrderedDict()
        """As an engine was last answered; None: nobody we know."""

    def opened(self, event: ConnectionOpened) -> None:
        key = (event.local_address, event.local_port)
        namesakes = self._opened.setdefault(key, {})
        namesakes.pop(event.network_namespace, None)
        namesakes[event.network_namespace] = _Opened(
            event.at_ns, Owner(event.sandbox, event.pid), event.remote_address, event.remote_port
        )
        self._opened.move_to_end(key)
        if len(namesakes) > NAMESAKES_COUNT:
            del namesakes[next(iter(namesakes))]
        if len(self._opened) > REMEMBERED_COUNT:
            self._opened.popitem(last=False)

    def who(self, engine: Engine, address: str, port: int, accepted_ns: int) -> Sandbox | None:
        """The sandbox whose process opened the connection that the engine accepted; None: nobody we know."""
        self._drain()
        pid = local_pid(address)
        if pid is not None:
            # A unix socket: the kernel told the engine who connected. Asked at once, so that it is still that process.
            local = self._sandbox_of(pid)
            found = Owner(local.cgroup_id, pid) if local is not None else None
        else:
            found = self._find(engine, address, port, accepted_ns)
        self._peers[engine.id, address, port] = found
        self._peers.move_to_end((engine.id, address, port))
        if len(self._peers) > REMEMBERED_COUNT:
            self._peers.popitem(last=False)
        return self._state.sandboxes.get(found.sandbox) if found is not None else None

    def _find(self, engine: Engine, address: str, port: int, accepted_ns: int) -> Owner | None:
        found = {
            namespace: opened.owner
            for namespace, opened in self._opened.get((address, port), {}).items()
            if -CLOCK_SLACK_NS <= accepted_ns - opened.at_ns <= ACCEPTED_WITHIN_NS and _leads_to(opened, engine)
        }
        if not found:
            return None
        home = self._namespace_of(engine.pid)
        if home in found:
            return found[home]
        if home is not None and _is_loopback(address):
            return None
        if len({owner.sandbox for owner in found.values()}) > 1:
            return None
        owners = set(found.values())
        return owners.pop() if len(owners) == 1 else Owner(owners.pop().sandbox, None)

    def owner_at(self, turn: TurnStarted) -> Owner | None:
        """Whose connection the turn came by; None: nobody's we know."""
        engine = self._state.engines.get(turn.engine)
        if engine is None or turn.peer_address is None or turn.peer_port is None:
            return None
        key = (turn.engine, turn.peer_address, turn.peer_port)
        # An engine that never asks is joined all the same, by the turns that begin soon after their connection.
        return self._peers[key] if key in self._peers else self._find(engine, key[1], key[2], turn.at_ns)

    # -- as a sink of the loop

    def __call__(self, event: Event, state: State) -> None:
        match event:
            case TurnStarted():
                self._turn_started(event, state)
            case EngineDetached(engine=engine):
                for key in [key for key in self._peers if key[0] == engine]:
                    del self._peers[key]
            case _:
                pass

    def _turn_started(self, event: TurnStarted, state: State) -> None:
        owner = self.owner_at(event)
        sandbox = owner.sandbox if owner is not None else None
        known = state.sessions.get(event.session)
        if sandbox in state.sandboxes and sandbox is not None and (known is None or known.sandbox != sandbox):
            self._emit(SessionJoined(event.at_ns, event.engine, event.session, sandbox))


def _leads_to(opened: _Opened, engine: Engine) -> bool:
    """Whether the connection's other end is where the engine listens; any will do where it does not say."""
    return not engine.listen_addresses or engine.listens_at(opened.remote_address, opened.remote_port)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
