"""Sandboxes and the tool calls in them: processes, cgroups, tags.

Owns: who is in which cgroup under which tag. Must not: apply policy, or hold anything back (enforce/).

Seen from outside: `adoption`, `cgroups`, `keeper`, `processes`, `roles`, `tool_calls`, `witness`.
"""
