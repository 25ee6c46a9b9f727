"""Pretrain under Megatron: torchrun --nproc_per_node=2 launch/pretrain_megatron.py --tensor-parallel 2."""

import importlib
import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

# Run as a script, as launchers do, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# At the end, so that an installed symdist_megatron comes before the one here.
sys.path.append(str(Path(__file__).resolve().parent.parent / "integrations"))

from launch.config import parse_as
from launch.data import Corpus
from launch.job import end_with, run
from launch.megatron_config import MegatronRun
from launch.ranks import Ranks, launched, local_device
from launch.training import Training
from launch.watchdog import Watchdog

_STAND_INS = "tests.symdist_megatron.on_cpu"


def main() -> int:
    """Run; the exit code: 0 at the end or after a clean stop, 2 for what the user can mend."""

    def configure() -> MegatronRun:
        config = parse_as(MegatronRun, sys.argv[1:])
        if not config.dry_run:
            # Before Megatron is imported, which takes long.
            config.check(ranks=launched()[1])
            _import_megatron()
        return config

    return run(configure, _start)


def _end_helpers() -> None:
    """End the process that Megatron's writer of checkpoints keeps: it would live on and hold the output open."""
    for helper in multiprocessing.active_children():
        helper.kill()


def _main_with_helpers() -> int:
    """As `main`, in a process of its own, all of whose children are helpers."""
    try:
        return main()
    finally:
        _end_helpers()


def _start(config: MegatronRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog) -> Training:
    from launch.megatron_training import MegatronTraining

    return MegatronTraining(config, corpus, ranks, watchdog)


def _import_megatron() -> None:
    """Import megatron-core, set up for the device at hand; ValueError, naming the remedy, where that fails."""
    # What it would do faster with packages that are not there.
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        importlib.import_module("megatron")
        if local_device().type == "cpu":
            _install_stand_ins()
        importlib.import_module("megatron.core")
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        raise ValueError(
            "launch/pretrain_megatron.py needs megatron-core: pip install 'symdist[megatron]', or pip install "
            "megatron-core"
        ) from None


def _install_stand_ins() -> None:
    """Let Megatron run without CUDA, and say so; ValueError where what that takes is not there."""
    try:
        stand_ins = importlib.import_module(_STAND_INS)
    except ModuleNotFoundError as error:
        if error.name is None or not _STAND_INS.startswith(error.name):
            raise
        raise ValueError(
            "Megatron needs CUDA, and not every process of this machine has a GPU; "
            f"{_STAND_INS.replace('.', '/')}.py, which lets tests run it on the CPU, is not there either: "
            "start as many processes as there are GPUs, or train with launch/pretrain.py"
        ) from None
    if os.environ["RANK"] == "0":
        print("no CUDA here: Megatron runs on stand-ins for it, for tests and trials only", file=sys.stderr, flush=True)
    stand_ins.install()


if __name__ == "__main__":
    end_with(_main_with_helpers)
