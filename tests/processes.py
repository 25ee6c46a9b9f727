"""Processes of tests: forked from one that has imported everything, and ended with the test run, whatever ends it."""

import ctypes
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# What most ranks need. Not megatron.core: its stand-ins on the CPU must come first, and are not for the others.
PRELOADED = (
    "tests.forked_from",
    *("torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard"),
    *("transformers", "symdist", "symdist.tools.models", "launch.loop.training", "launch.engines.fsdp.training"),
    *("deepspeed", "tests.ranks", "tests.parity"),
)


def warm_start() -> ForkServerContext:
    """The context of processes that are forked from one that has imported `PRELOADED`, started when first asked for.

    To import PyTorch and a trainer takes seconds of a processor, which a run of tests would spend fifty times.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # Those that are not installed are passed over.
    # The process that preloads has this one's variables, not its path. Compiling is left out: it would take minutes.
    roots = [str(ROOT), str(ROOT / "integrations"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, roots)))}
    with mock.patch.dict(os.environ, variables | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}):
        forkserver.ensure_running()
    return context


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent ends, even by SIGKILL; on Linux only.

    A killed test run would otherwise leave ranks behind that wait for each other until their collectives time out.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return
    PR_SET_PDEATHSIG = 1
    prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)


def agent_ends_with_parent() -> None:
    """As `end_with_parent`, for torchrun and scripts, which end their own ranks when told to."""
    end_with_parent(signal.SIGTERM)


def print_to(path: str) -> None:
    """Have this process and those that it starts print to a file."""
    stream = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
