"""The pure core: facts in, decisions out.

Standard library only; no I/O, no clock, no threads. Time enters as `now_ns` (CLOCK_MONOTONIC nanoseconds).
"""
