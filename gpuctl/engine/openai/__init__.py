"""The OpenAI-compatible HTTP endpoint.

Owns: the wire format, connections and their bounds, what a request may hold its output to. Must not: touch the books
or llama.cpp; it speaks to the engine through `submit`, `cancel` and `books_now`.

Seen from outside: `connection`, `http`.
"""
