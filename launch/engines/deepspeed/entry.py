"""What `launch.pretrain_deepspeed` runs: DeepSpeed is imported only once the command line is known to be right."""

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
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""
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
    """Import what needs DeepSpeed, set up for the device at hand; ValueError, naming the remedy, where that fails."""
    if local_device().type == "cpu":
        # DeepSpeed looks for itself what devices there are, at its import.
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
    """The arguments but `--local_rank`, which launchers put among them; where they do not set it, it is set here."""
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(rest, "0"))
        else:
            yield word
