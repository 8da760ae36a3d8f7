"""What is seen and remembered: samplers, counts, recent history, Prometheus, the journal.

Must not: change anything in the world; sources only emit events.
"""
