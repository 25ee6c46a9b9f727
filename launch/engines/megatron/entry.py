"""What `launch.pretrain_megatron` runs: Megatron is imported only once the command line is known to be right."""

import importlib
import logging
import multiprocessing
import os
import sys
import warnings

import torch

from launch.data import Corpus
from launch.engines.megatron import on_cpu
from launch.engines.megatron.config import MegatronRun
from launch.loop.config import parse_as
from launch.loop.job import run
from launch.loop.training import Training
from launch.runtime.distributed import Ranks, launched, local_device
from launch.runtime.watchdog import Watchdog


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


def main_with_helpers() -> int:
    """As `main`, in a process of its own, all of whose children are helpers."""
    try:
        return main()
    finally:
        _end_helpers()


def _start(config: MegatronRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog) -> Training:
    from launch.engines.megatron.training import MegatronTraining

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
            "launch.pretrain_megatron needs megatron-core: pip install 'symdist[megatron]', or pip install "
            "megatron-core"
        ) from None


def _install_stand_ins() -> None:
    """Let Megatron run without CUDA, and say so; ValueError where some processes of this machine have a GPU."""
    if torch.cuda.is_available():
        raise ValueError(
            "Megatron needs CUDA, and not every process of this machine has a GPU: start as many processes as there "
            "are GPUs, or train with launch.pretrain"
        )
    if os.environ["RANK"] == "0":
        print("no CUDA here: Megatron runs on stand-ins for it, for tests and trials only", file=sys.stderr, flush=True)
    on_cpu.install()
