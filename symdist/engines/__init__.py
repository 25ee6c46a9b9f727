"""What the adapters for training engines (DeepSpeed, Megatron) share."""
