"""A pretraining job from its command line to its exit code, the same for all engines."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from launch.checkpoints.manifest import CheckpointError
from launch.data import Corpus, prepare, prepare_on_ranks
from launch.loop.config import Config
from launch.loop.dry_run import dry_run
from launch.loop.training import Training
from launch.records.run_log import RunLog, already_finished, check_folder
from launch.runtime.distributed import AllRanksError, Ranks, connect, die_with_parent, launched
from launch.runtime.folder_lock import FolderLock, launch_id
from launch.runtime.signals import StopSignals
from launch.runtime.watchdog import Watchdog
from symdist.tools.texts import printable

C = TypeVar("C", bound=Config)


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
            _tell(f"error: {error}")
        return 2
    except OSError as error:
        if rank == 0:
            _tell(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}")
        return 2
    try:
        return _pretrain(config, start, rank=rank)
    except (ValueError, CheckpointError) as error:
        if rank == 0:
            _tell(f"error: {error}")
        elif not isinstance(error, AllRanksError | CheckpointError):
            # Perhaps only this rank hit it.
            _tell(f"error: rank {rank}: {error}")
        return 2


def _tell(text: str) -> None:
    """Print an error, which may hold what users and files say, as lines of visible characters."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


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
    signals = StopSignals(log.say)
    signals.listen()
    lock = FolderLock(config.output, launch=launch_id(), say=log.say)

    def first() -> None:
        lock.acquire()
        signals.before_leaving = partial(lock.release, failed=True)
        prepare(config.data, progress=log.say)

    watchdog = Watchdog(config.timeout, rank=rank, report=lambda text: log.event(0, "timeout", text))
    try:
        with connect(timeout=config.timeout, signals=signals, first=first, watch=watchdog.start) as ranks:
            begun = ranks.gather(lock.begun)[0]
            if not (ranks.restarts and begun):
                ranks.restarts = 0
                # Rank 0 writes into the folder only after all ranks have checked it.
                ranks.everywhere(lambda: check_folder(config.output, resume=config.resume))
            watchdog.doing("checking the data", slow=True)
            corpus = prepare_on_ranks(
                config.data,
                everywhere=ranks.everywhere,
                gather=ranks.gather,
                # Those of one node, since each may have a disk of its own.
                rank=int(os.environ["LOCAL_RANK"]),
                world=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"),
            )
            try:
                training = start(config, corpus, ranks, watchdog)
                resumed_at = training.resume(log)
                # On all ranks at once, before rank 0 writes: one that left now would leave the others waiting.
                signals.training = True
                if rank == 0:
                    lock.begin()
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
                _tell(f"error: rank {rank} in {watchdog.where()}: {error}")
                raise
            watchdog.doing("leaving", slow=True)
            if summary is not None:
                log.event(config.steps, "finish", f"finished {config.steps} steps")
    except (ValueError, CheckpointError):
        lock.release(failed=True)
        raise
    lock.release()
    watchdog.stop()
    return 0


def _log_start(log: RunLog, training: Training, resumed_at: int | None, *, output: Path) -> None:
    ranks = training.ranks
    restarts = f", after {ranks.restarts} restarts" if ranks.restarts else ""
    if resumed_at is not None:
        log.event(resumed_at, "resume", f"resumed at step {resumed_at} on {ranks.world} ranks{restarts}")
    else:
        log.event(0, "start", f"started on {ranks.world} ranks{restarts}, in {output}")
