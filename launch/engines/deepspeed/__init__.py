"""Training under DeepSpeed."""
