"""The entry of `launch.pretrain_megatron`; it imports Megatron only after the command line is checked."""

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
    """Run the job that the command line describes.

    Returns:
        The exit code: 0 after a finished run or a clean stop, 2 for an error that the user can fix.
    """

    def configure() -> MegatronRun:
        config = parse_as(MegatronRun, sys.argv[1:])
        if not config.dry_run:
            # Checked before importing Megatron, which takes long.
            config.check(ranks=launched()[1])
            _import_megatron()
        return config

    return run(configure, _start)


def _end_helpers() -> None:
    """Kill the process that Megatron's checkpoint writer keeps; it would live on and keep the output open."""
    for helper in multiprocessing.active_children():
        helper.kill()


def main_with_helpers() -> int:
    """Run `main`, then kill all child processes; for use where this job is the whole process."""
    try:
        return main()
    finally:
        _end_helpers()


def _start(config: MegatronRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog) -> Training:
    from launch.engines.megatron.training import MegatronTraining

    return MegatronTraining(config, corpus, ranks, watchdog)


def _import_megatron() -> None:
    """Import megatron-core, set up for this device; raise ValueError with the remedy if it is missing."""
    # Hide its warnings about optional packages that would make it faster.
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
    """Let Megatron run without CUDA, and print a note; raise ValueError if this machine has GPUs."""
    if torch.cuda.is_available():
        raise ValueError(
            "Megatron needs CUDA, but this machine has fewer GPUs than processes: start as many processes as there "
            "are GPUs, or train with launch.pretrain"
        )
    if os.environ["RANK"] == "0":
        print(
            "this machine has no CUDA: Megatron runs on stand-ins for it, for tests and trials only",
            file=sys.stderr,
            flush=True,
        )
    on_cpu.install()
