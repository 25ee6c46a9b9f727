"""Pretraining jobs that use the symdist optimizers: data, training loop, checkpoints and reports."""
