"""What-if: a world in virtual time around State and decide().

Agents play scripts, tools use memory, an engine computes turns and holds KV in three tiers; a policy by name is in
force. Owns: the world's clock, its engine and its host, the rivals, the score, the bound that nobody can beat.
Must not: read files or clocks, or be imported by the core that it is built around. Chance enters as a seed.

Seen from outside: `bound`, `daemon`, `engine`, `machine`, `names`, `score`, `script`, `traces`, `world`.
"""
