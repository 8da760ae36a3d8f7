"""The embedded engine: llama.cpp under our own scheduling of KV memory."""
