"""The one mutable picture of the host.

Owns: the meaning of events. Must not: decide, or know the time but from events and `snapshot(now_ns)`.

Seen from outside: `REMEMBER_NS`, `State`.
"""

from .state import REMEMBER_NS, State

__all__ = ["REMEMBER_NS", "State"]
