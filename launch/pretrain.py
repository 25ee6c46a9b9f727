"""Pretrain a language model under FSDP2: torchrun --nproc_per_node=2 -m launch.pretrain --help."""

import sys

from launch.engines.fsdp.config import FsdpRun
from launch.engines.fsdp.training import FsdpTraining
from launch.loop.config import parse_as
from launch.loop.job import end_with, run


def main() -> int:
    """Run the job that the command line describes.

    Returns:
        The exit code: 0 after a finished run or a clean stop, 2 for an error that the user can fix.
    """
    return run(lambda: parse_as(FsdpRun, sys.argv[1:]), FsdpTraining)


if __name__ == "__main__":
    end_with(main)
