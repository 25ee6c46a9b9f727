"""Writing, checking and reading the checkpoints of a run."""
