"""`equipoise top`: a Textual application that talks gRPC only."""
