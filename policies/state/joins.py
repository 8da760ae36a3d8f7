"""Which sandbox a session belongs to, as found from its connections rather than told by its agent.

Owns the joins, those of sessions that their engine has not shown yet included, and which session of a sandbox last
asked for a tool.
"""

from __future__ import annotations

from ..events import ConnectionOpened
from .picture import Picture, arm


def _connection_opened(_picture: Picture, _event: ConnectionOpened) -> None:
    """Nothing yet: it says who a peer is to whoever asks; a join is told apart."""


ARMS = (arm(ConnectionOpened, _connection_opened),)
