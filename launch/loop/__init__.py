"""The training loop, the same under every engine."""
