"""KV in its three places: copies out of the device, back into it, and to files.

Owns: the copies, and the moves of a plan carried out. Must not: choose a session or a tier (schedule/).

Seen from outside: `disk_tier`, `mover`, `swapper`.
"""
