"""A pretraining job from its command line to its exit code, whatever shards the model."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from launch.checkpoint_directory import CheckpointError
from launch.config import Config
from launch.data import Corpus, prepare
from launch.dry_run import dry_run
from launch.ranks import Ranks, connect, launched
from launch.runlog import RunLog, already_finished, check_folder
from launch.training import Training
from launch.watchdog import Watchdog

C = TypeVar("C", bound=Config)


def run(configure: Callable[[], C], start: Callable[[C, Corpus, Ranks, Watchdog], Training]) -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend.

    `configure` reads the command line, `start` builds what is trained once the ranks are connected; both may raise
    ValueError, in the same way on all ranks.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = configure()
        if config.dry_run:
            dry_run(config)
            return 0
        rank, world = launched()
        config.check(ranks=world)
        return _pretrain(config, start, rank=rank)
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


def _pretrain(config: C, start: Callable[[C, Corpus, Ranks, Watchdog], Training], *, rank: int) -> int:
    """Prepare the data, connect and train; see `run`."""
    log = RunLog(config.output, steps=config.steps, write=rank == 0)
    if config.resume == "auto" and already_finished(config.output, steps=config.steps):
        log.say(f"{config.output} has come to its {config.steps} steps already")
        return 0

    def first() -> None:
        prepare(config.data, progress=log.say)

    with connect(timeout=config.timeout, first=first) as ranks:
        if not ranks.restarts:
            # Together: the first rank's log must not be there before all have looked.
            _everywhere(ranks, lambda: check_folder(config.output, resume=config.resume))
        watchdog = Watchdog(config.timeout, rank=rank, report=lambda text: log.event(0, "timeout", text))
        watchdog.start()
        try:
            training = start(config, prepare(config.data), ranks, watchdog)
            resumed_at = training.resume(log)
            log.begin(resumed_at)
            _tell_of_start(log, training, resumed_at, output=config.output)
            summary = None
            try:
                summary = training.run(log)
            finally:
                log.finish(summary)
        except CheckpointError:
            raise
        except RuntimeError as error:
            # Whatever it is, where it came up is half of what there is to know of it.
            print(f"error: rank {rank} in {watchdog.where()}: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            watchdog.stop()
        if summary is not None:
            log.event(config.steps, "finish", f"finished {config.steps} steps")
    return 0


def _tell_of_start(log: RunLog, training: Training, resumed_at: int | None, *, output: Path) -> None:
    ranks = training.ranks
    again = f", after {ranks.restarts} restarts" if ranks.restarts else ""
    if resumed_at is not None:
        log.event(resumed_at, "resume", f"resumed at step {resumed_at} on {ranks.world} ranks{again}")
    else:
        log.event(0, "start", f"started on {ranks.world} ranks{again}, in {output}")


def _everywhere(ranks: Ranks, function: Callable[[], None]) -> None:
    """Call a function that may raise ValueError, which is then raised on all ranks."""
    failure = None
    try:
        function()
    except ValueError as error:
        failure = str(error)
    failures = [told for told in ranks.gather(failure) if told is not None]
    if failures:
        raise ValueError(failures[0])
