"""Training under Megatron-core."""
