"""Pretrain a language model with a symdist recipe: torchrun --nproc_per_node=2 -m launch.pretrain --help."""

import sys

from launch.engines.fsdp.config import FsdpRun
from launch.engines.fsdp.training import FsdpTraining
from launch.loop.config import parse_as
from launch.loop.job import end_with, run


def main() -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""
    return run(lambda: parse_as(FsdpRun, sys.argv[1:]), FsdpTraining)


if __name__ == "__main__":
    end_with(main)
