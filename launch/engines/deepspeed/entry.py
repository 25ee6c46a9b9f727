"""The entry of `launch.pretrain_deepspeed`; it imports DeepSpeed only after the command line is parsed."""

import os
import sys
from collections.abc import Iterator

from launch.data import Corpus
from launch.engines.deepspeed.config import DeepSpeedRun
from launch.loop.config import parse_as
from launch.loop.job import run
from launch.loop.training import Training
from launch.runtime.distributed import Ranks, launched, local_device
from launch.runtime.watchdog import Watchdog


def main() -> int:
    """Run the job that the command line describes.

    Returns:
        The exit code: 0 after a finished run or a clean stop, 2 for an error that the user can fix.
    """
    arguments = list(_without_local_rank(sys.argv[1:]))

    def configure() -> DeepSpeedRun:
        config = parse_as(DeepSpeedRun, arguments)
        if not config.dry_run:
            launched()
            _import_deepspeed()
        return config

    return run(configure, _start)


def _start(config: DeepSpeedRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog) -> Training:
    from launch.engines.deepspeed.training import DeepSpeedTraining

    return DeepSpeedTraining(config, corpus, ranks, watchdog)


def _import_deepspeed() -> None:
    """Import what needs DeepSpeed, set up for this device; raise ValueError with the remedy if that fails."""
    if local_device().type == "cpu":
        # DeepSpeed chooses its device when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import symdist_deepspeed

        symdist_deepspeed.register()
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(
            "launch.pretrain_deepspeed needs DeepSpeed: pip install 'symdist[deepspeed]', or pip install deepspeed"
        ) from None
    except ImportError as error:
        raise ValueError(str(error)) from error


def _without_local_rank(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments without the launchers' `--local_rank`; set LOCAL_RANK from it if it is not set."""
    remaining = iter(arguments)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(remaining, "0"))
        else:
            yield word
