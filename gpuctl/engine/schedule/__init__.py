"""Who computes what, and whose KV lives where. Pure: no clock, no library, no threads; time comes in as a number.

Owns: the words of the engine (sessions, turns, slots), the books of KV, admission, order, placement, shared prefixes
and what a directive changes in all of these. Must not: touch llama.cpp, copy a byte of KV or speak to anybody.

Seen from outside: `cost_figures`, `directing`, `ledger`, `plan`, `scheduler`, `sequence`, `session_index`, `slo`.
"""
