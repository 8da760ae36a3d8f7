"""The one mutable picture of the host."""

from .state import REMEMBER_NS, State

__all__ = ["REMEMBER_NS", "State"]
