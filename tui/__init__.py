"""The terminal dashboard: `equipoise top`. Speaks gRPC with the daemon and nothing else."""
