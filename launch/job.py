"""A pretraining job from its command line to its exit code, whatever shards the model."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from launch.checkpoint_directory import CheckpointError
from launch.config import Config
from launch.data import Corpus, prepare
from launch.ranks import Ranks, connect, launched
from launch.runlog import RunLog, already_finished, check_folder
from launch.training import Training

C = TypeVar("C", bound=Config)


def run(configure: Callable[[], C], start: Callable[[C, Corpus, Ranks], Training]) -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend.

    `configure` reads the command line, `start` builds what is trained once the ranks are connected; both may raise
    ValueError, in the same way on all ranks.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    rank = 0
    try:
        rank, world = launched()
        config = configure()
        config.check(ranks=world)
        check_folder(config.output, resume=config.resume)
        return _pretrain(config, start, first=rank == 0)
    except (ValueError, CheckpointError) as error:
        # All ranks meet the same fault; one tells.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2


def leave(code: int) -> NoReturn:
    """End the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads, still held by meshes and tensors, can abort a process whose interpreter is torn down
    # (pytorch#190489), and torchrun would take a finished run for a failed one.
    os._exit(code)


def _pretrain(config: C, start: Callable[[C, Corpus, Ranks], Training], *, first: bool) -> int:
    """Prepare the data, connect and train; see `run`."""

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
        training = start(config, prepare(config.data), ranks)
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
