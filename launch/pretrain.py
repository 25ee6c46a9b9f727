"""Pretrain a language model with a symdist recipe: torchrun --nproc_per_node=2 launch/pretrain.py --help."""

import sys
from pathlib import Path

# Run as a script, as torchrun does, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.config import parse_as
from launch.fsdp_config import FsdpRun
from launch.fsdp_training import FsdpTraining
from launch.job import end_with, run


def main() -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""
    return run(lambda: parse_as(FsdpRun, sys.argv[1:]), FsdpTraining)


if __name__ == "__main__":
    end_with(main)
