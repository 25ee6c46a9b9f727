"""A pretraining job from its command line to its exit code, the same for all engines."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from launch.checkpoints.directory import CheckpointError
from launch.data import Corpus, prepare
from launch.loop.config import Config
from launch.loop.dry_run import dry_run
from launch.loop.training import Training
from launch.records.run_log import RunLog, already_finished, check_folder
from launch.runtime.distributed import AllRanksError, Ranks, connect, die_with_parent, launched
from launch.runtime.watchdog import Watchdog

C = TypeVar("C", bound=Config)

# File in the output folder with torchrun's id of the launch that last began a run there.
_LAUNCH = ".launch"


def run(configure: Callable[[], C], start: Callable[[C, Corpus, Ranks, Watchdog], Training]) -> int:
    """Run a job; every rank calls it.

    Args:
        configure: Reads the command line, with the same result on all ranks; may raise ValueError.
        start: Builds the training once the ranks are connected; may raise ValueError.

    Returns:
        The exit code: 0 after a finished run or a clean stop, 2 for an error that the user can fix.

    Example:
        >>> end_with(lambda: run(lambda: parse_as(FsdpRun, sys.argv[1:]), FsdpTraining))
    """
    die_with_parent()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = configure()
        if config.dry_run:
            dry_run(config)
            return 0
        rank, world = launched()
        config.check(ranks=world)
    except (ValueError, CheckpointError) as error:
        # All ranks hit the same error, so one reports it.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _pretrain(config, start, rank=rank)
    except (ValueError, CheckpointError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, AllRanksError | CheckpointError):
            # Perhaps only this rank hit it.
            print(f"error: rank {rank}: {error}", file=sys.stderr)
        return 2


def end_with(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process at once with its exit code; 1 after an uncaught exception."""
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """Flush the output and end the process at once, without tearing down the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: gloo's threads, which meshes and tensors keep alive, can abort the process while the interpreter is
    # torn down (pytorch#190489), and torchrun would then count a finished run as failed.
    os._exit(code)


def _pretrain(config: C, start: Callable[[C, Corpus, Ranks, Watchdog], Training], *, rank: int) -> int:
    """Prepare the data, connect and train; see `run`."""
    log = RunLog(config.output, steps=config.steps, write=rank == 0)
    if config.resume == "auto" and already_finished(config.output, steps=config.steps):
        log.say(f"{config.output} has finished its {config.steps} steps already; there is nothing to do")
        return 0

    def first() -> None:
        prepare(config.data, progress=log.say)

    watchdog = Watchdog(config.timeout, rank=rank, report=lambda text: log.event(0, "timeout", text))
    with connect(timeout=config.timeout, first=first, watch=watchdog.start) as ranks:
        if not _started_before(ranks, config.output):
            ranks.restarts = 0
            # Rank 0 writes into the folder only after all ranks have checked it.
            ranks.everywhere(lambda: check_folder(config.output, resume=config.resume))
            _note_start(ranks, config.output)
        corpus = ranks.everywhere(lambda: prepare(config.data))
        try:
            training = start(config, corpus, ranks, watchdog)
            resumed_at = training.resume(log)
            log.begin(resumed_at)
            _log_start(log, training, resumed_at, output=config.output)
            summary = None
            try:
                summary = training.run(log)
            finally:
                log.finish(summary)
        except CheckpointError:
            raise
        except RuntimeError as error:
            # The error itself does not say what the run was doing.
            print(f"error: rank {rank} in {watchdog.where()}: {error}", file=sys.stderr, flush=True)
            raise
        watchdog.doing("leaving", slow=True)
        if summary is not None:
            log.event(config.steps, "finish", f"finished {config.steps} steps")
    watchdog.stop()
    return 0


def _started_before(ranks: Ranks, output: Path) -> bool:
    """Return whether torchrun restarted ranks that had begun this run, not ranks that were refused at the start."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    path = output / _LAUNCH
    launch_id = ranks.gather(path.read_text() if path.exists() else None)[0]
    return ranks.restarts > 0 and run is not None and launch_id == run


def _note_start(ranks: Ranks, output: Path) -> None:
    if ranks.rank == 0:
        with contextlib.suppress(OSError):
            output.mkdir(parents=True, exist_ok=True)
            (output / _LAUNCH).write_text(os.environ.get("TORCHELASTIC_RUN_ID", ""))


def _log_start(log: RunLog, training: Training, resumed_at: int | None, *, output: Path) -> None:
    ranks = training.ranks
    restarts = f", after {ranks.restarts} restarts" if ranks.restarts else ""
    if resumed_at is not None:
        log.event(resumed_at, "resume", f"resumed at step {resumed_at} on {ranks.world} ranks{restarts}")
    else:
        log.event(0, "start", f"started on {ranks.world} ranks{restarts}, in {output}")
