"""The simulated engine: turns under a rule, tiers and copies, prefill and decode, the door.

Owns what an engine does in virtual time. Must not: know tools or the daemon (world/).

Seen from outside: `door`, `engine`, `rules`, `seat`, `tiers`, `waits`.
"""
