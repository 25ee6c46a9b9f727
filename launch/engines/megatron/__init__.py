"""Training with megatron-core."""
