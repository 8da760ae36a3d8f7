"""Claude Code hooks: tool-call boundaries told by the agent itself."""
