"""Pretraining jobs that use the symdist optimizers: data, training loop, checkpoints and reports."""

import os

# Who started this process. Read before PyTorch is imported, which takes seconds in which a launcher can be lost.
LAUNCHER = os.getppid()
