"""RAM of tool calls: who is granted some, who waits, who is slowed down or ended.

Owns the ladder and the order of grants. Must not: decide on KV (kv/).

Seen from outside: `grants`, `ladder`, `relief`, `step`.
"""
