"""Training runs of the optimizers in symdist: data, loop, checkpoints and reports."""
