"""The daemon's gRPC services, the commands' side of them, and facts as messages and words.

Owns: the checking of requests and the translation of answers. Must not: decide, or act on a process itself.

Seen from outside: `client`, `policy_server`, `sandbox_server`, `server`.
"""
