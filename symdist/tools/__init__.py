"""What the command `symdist` does: previews and benchmarks, and how they are shown."""
