"""Everything about the model's side: NVML facts, the engine hook (both ends), the embedded engine."""
