"""Equipoise: one memory economy for AI agents (host RAM of tool calls, KV cache of their sessions).

The repository root is this package; see README.md for the map of the folders.
"""

__version__ = "0.1.0"
