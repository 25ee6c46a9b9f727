"""Training under FSDP2."""
