"""`equipoise demo`: real agents, real tool calls, one report."""
