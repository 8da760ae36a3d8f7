"""KV of sessions whose agents are busy with a tool: where it is worth most, and how many sessions are awake.

Owns the books and prices of KV and the door. Must not: decide on tool calls (memory/).

Seen from outside: `door`, `economy`.
"""
