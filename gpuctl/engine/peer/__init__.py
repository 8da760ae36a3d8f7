"""Handing a session over to another engine of the host, in the middle of its answer.

Owns: both ends of peer.proto, on the engine's thread (giving, taking) and on the event loop (their rpc ends). Must not:
choose which session moves; who calls `hand-over` does.

Seen from outside: `command`, `handovers`, `service`.
"""
