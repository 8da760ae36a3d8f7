"""`equipoise demo`: real agents, real tool calls, one report.

Owns: the cast, its run and its report. Must not: reach into the daemon but by gRPC and its command line.
"""
