"""An agent of the demo: what runs inside its sandbox, and what it is given to work on.

Owns: the agent's process, its script, its tool calls and its half of what is said to the engine and the daemon. Must
not: know of the other agents, the run or the report.

Seen from outside: `plan`, `sample`.
"""
