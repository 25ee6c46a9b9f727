"""Training with PyTorch's FSDP2."""
