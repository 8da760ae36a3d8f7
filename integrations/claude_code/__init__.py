"""Claude Code: hooks that announce each tool call to the daemon and tell the agent what was done to it."""
