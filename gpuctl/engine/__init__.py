"""The embedded engine: llama.cpp under our own scheduling of KV memory.

Owns: the step loop at the top and its wings below. Must not: be imported by what other engines share (gpuctl/).

Seen from outside: `ending`, `errors`.
"""
