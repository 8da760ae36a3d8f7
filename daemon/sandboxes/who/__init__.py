"""The parts of roles.py: who is who below an agent.

Owns: records in the kernel by role, command lines of persistent shells, agents inside calls, who speaks to a model, and
what was ruled before its conversation was heard. Must not: rule by itself (policies/roles.py does), or be seen from
outside of `sandboxes/`.
"""
