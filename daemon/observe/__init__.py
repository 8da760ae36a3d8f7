"""What is seen and remembered: samplers, counts, recent history, Prometheus, the journal.

Owns: how often to look, and what is kept of it. Must not: change anything in the world; sources only emit events.

Seen from outside: `archive`, `history`, `joins`, `journal`, `kernel`, `metrics`, `recording`, `sources`, `tallies`.
"""
