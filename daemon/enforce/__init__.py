"""Carrying out what was decided about tool calls, and letting go of it.

Owns: the rungs of the host-memory ladder, what is held back now, and its undoing by whoever comes after. Must not:
decide anything.

Seen from outside: `actuator`, `fallback_budget`, `following`, `guardian`, `guarding`, `holds`,
`targets`.
"""
