"""Everything about the model's side: facts of GPUs and memory, the engine hook (both ends), the engines."""
