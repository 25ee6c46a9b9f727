"""Pretrain a language model with a symdist recipe: torchrun --nproc_per_node=2 launch/pretrain.py --help."""

import sys
import warnings
from pathlib import Path

# Run as a script, as torchrun does, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.checkpoint import CheckpointError
from launch.config import Config, parse_command_line
from launch.data import Corpus, prepare
from launch.ranks import Ranks, connect
from launch.runlog import RunLog, check_folder
from launch.training import Training


def main() -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        config = parse_command_line(sys.argv[1:])
        with connect() as ranks:
            return pretrain(config, ranks)
    except (ValueError, RuntimeError) as error:
        if not isinstance(error, ValueError | CheckpointError) and not str(error).startswith("start this"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def pretrain(config: Config, ranks: Ranks) -> int:
    """Run on connected ranks; see `main`."""
    config.check(ranks=ranks.world)
    check_folder(config.output, resume=config.resume)
    corpus = prepare_together(config, ranks)
    training = Training(config, corpus, ranks)
    resumed_at = training.resume(lambda text: print(text, file=sys.stderr) if ranks.first else None)
    log = RunLog(config.output, steps=config.steps, write=ranks.first, resumed_at=resumed_at)
    if resumed_at is not None:
        log.say(f"resumed at step {resumed_at}")
    summary = None
    try:
        summary = training.run(log)
    finally:
        log.finish(summary)
    return 0


def prepare_together(config: Config, ranks: Ranks) -> Corpus:
    """The corpus: the first rank prepares it, the others read what it cached.

    Raises DataError on every rank, for each meets the same fault when its turn comes.
    """
    if ranks.first:
        try:
            corpus = prepare(config.data, progress=lambda text: print(text, file=sys.stderr, flush=True))
        finally:
            ranks.barrier()
        return corpus
    ranks.barrier()
    return prepare(config.data)


if __name__ == "__main__":
    sys.exit(main())
