"""KV below the device: copies out of it, down from tier to tier, and back.

Owns: the copies, and the moves of a plan carried out. Must not: choose a session or a tier (schedule/).

Seen from outside: `disk_tier`, `mover`, `store`, `swapper`, `table`.
"""
