"""llama.cpp: the binding, the model and its text, batches, samplers, and the saved form of a sequence's KV.

Owns: every call into the library, and what turns text into tokens and back. Must not: choose what is computed
(schedule/) or keep copies of KV (tiers/).

Seen from outside: `constraint`, `conversation`, `kv_image`, `language_model`, `llama`, `model`, `runner`, `sampler`,
`text`, `tool_calls`.
"""
