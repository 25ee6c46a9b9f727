"""The training loop, shared by all engines."""
