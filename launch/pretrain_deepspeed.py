"""Pretrain under DeepSpeed: torchrun --nproc_per_node=2 launch/pretrain_deepspeed.py --deepspeed FILE.json."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Run as a script, as launchers do, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# At the end, so that an installed symdist_deepspeed comes before the one here.
sys.path.append(str(Path(__file__).resolve().parent.parent / "integrations"))

from launch.config import parse_as
from launch.data import Corpus
from launch.deepspeed_config import DeepSpeedRun
from launch.job import end_with, run
from launch.ranks import Ranks, launched, local_device
from launch.training import Training
from launch.watchdog import Watchdog


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
    from launch.deepspeed_training import DeepSpeedTraining

    return DeepSpeedTraining(config, corpus, ranks, watchdog)


def _import_deepspeed() -> None:
    """Import what needs DeepSpeed, set up for the device at hand; ValueError, naming the remedy, where that fails."""
    if local_device().type == "cpu":
        # DeepSpeed looks for itself what devices there are, at its import.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import symdist_deepspeed  # noqa: F401  It registers the type.
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(
            "launch/pretrain_deepspeed.py needs DeepSpeed: pip install 'symdist[deepspeed]', or pip install deepspeed"
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


if __name__ == "__main__":
    end_with(main)
