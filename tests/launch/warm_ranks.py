"""Ranks of pretraining runs forked from a process that has imported everything already, in place of torchrun's.

A start by torchrun imports PyTorch three times and the job twice, which takes most of a short run's time. What torchrun
itself adds (its agent, restarts, its own store) is tested with real starts.
"""

import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

import torch

import launch
from tests.processes import ROOT, end_with_parent, print_to, warm_start

GRACE_SECONDS = 15.0


def run_warm(module: str, arguments: list[str], *, ranks: int, env: Mapping[str, str]) -> CompletedProcess[str]:
    """Run `python -m module arguments` on so many ranks, and return what torchrun would: a code, and all stderr."""
    context = warm_start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": str(port)}
            variables = {**env, **{name: str(value) for name, value in place.items()}}
            output = f"{folder}/{rank}"
            processes.append(context.Process(target=_rank, args=(module, arguments, variables, output)))
            processes[-1].start()
        _wait(processes)
        codes = [process.exitcode for process in processes]
        said = "".join(Path(f"{folder}/{rank}").read_text() for rank in range(ranks))
    return CompletedProcess([module, *arguments], next((code for code in codes if code), 0) or 0, "", said)


def _wait(processes: list[ForkServerProcess]) -> None:
    """Wait for all; once one has failed, end the others after a while, as torchrun does."""
    deadline = None
    while any(process.is_alive() for process in processes):
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    for process in processes:
        process.join()


def _rank(module: str, arguments: list[str], variables: Mapping[str, str], output: str) -> None:
    end_with_parent()
    launch.LAUNCHER = os.getppid()
    print_to(output)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
