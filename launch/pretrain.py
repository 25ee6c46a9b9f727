"""Pretrain a language model with a symdist recipe: torchrun --nproc_per_node=2 launch/pretrain.py --help."""

import os
import sys
import warnings
from pathlib import Path

import torch

# Run as a script, as torchrun does, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.checkpoint import CheckpointError
from launch.config import Config, parse_command_line
from launch.data import prepare
from launch.ranks import connect, launched
from launch.runlog import RunLog, already_finished, check_folder
from launch.training import Training


def main() -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    rank = 0
    try:
        rank, world = launched()
        config = parse_command_line(sys.argv[1:])
        config.check(ranks=world)
        check_folder(config.output, resume=config.resume)
        return pretrain(config, first=rank == 0)
    except (ValueError, CheckpointError) as error:
        # All ranks meet the same fault; one tells.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2


def pretrain(config: Config, *, first: bool) -> int:
    """Prepare the data, connect and train; see `main`."""

    def say(text: str) -> None:
        if first:
            print(text, file=sys.stderr, flush=True)

    if config.resume == "auto" and already_finished(config.output, steps=config.steps):
        say(f"{config.output} has come to its {config.steps} steps already")
        return 0
    if first:
        # Before the ranks meet, so that nobody's collective times out over a large corpus; the others read the cache.
        prepare(config.data, progress=say)
    with connect() as ranks:
        # Connecting need not wait for anyone; this does, and then the first rank's cache is there.
        ranks.sum(torch.zeros(1, device=ranks.device))
        training = Training(config, prepare(config.data), ranks)
        resumed_at = training.resume(say)
        log = RunLog(config.output, steps=config.steps, write=first, resumed_at=resumed_at)
        if resumed_at is not None:
            log.say(f"resumed at step {resumed_at}")
        summary = None
        try:
            summary = training.run(log)
        finally:
            log.finish(summary)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads, still held by meshes and tensors, can abort a process whose interpreter is torn down
    # (pytorch#190489), and torchrun would take a finished run for a failed one.
    os._exit(code)
