"""The ranks of a run: process group, device, and what they agree on."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from launch.runtime.watchdog import SLOW_SECONDS
from symdist.engines.agreement import gather, gather_unless_failed

T = TypeVar("T")

# While the first rank prepares a corpus, which may be a large one, the others wait.
_PREPARING = timedelta(days=2)


class AllRanksError(ValueError):
    """What all ranks raise, since one of them met it: one tells."""


@dataclass(kw_only=True)
class Ranks:
    """This process among the others. `stopping` turns true once SIGTERM, SIGUSR1 or SIGINT reached this rank.

    `restarts` counts how often the launcher started ranks again; of several nodes it is the most that any saw.
    """

    rank: int
    world: int
    device: torch.device
    restarts: int = 0
    stopping: bool = field(default=False)

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def most(self, value: float) -> float:
        """The largest `value` of any rank."""
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        return gather(value)

    def everywhere(self, function: Callable[[], T]) -> T:
        """Call a function that may raise ValueError, which then all ranks raise."""
        result, failure = None, None
        try:
            result = function()
        except ValueError as error:
            failure = str(error)
        gather_unless_failed(None, failure, error=AllRanksError)
        return cast(T, result)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read after it counts the work before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher tells them; ValueError where there was none."""
    if "RANK" not in os.environ:
        module = f"launch.{Path(sys.argv[0]).stem}"
        raise ValueError(f"start this with torchrun, as in: torchrun --nproc_per_node=2 -m {module}")
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise ValueError(f"the launcher set RANK but not {' and '.join(missing)}; start this with torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_device() -> torch.device:
    """This process's GPU where every process of its machine has one, else the CPU.

    Raises ValueError where it cannot be told what the others have, and there is none for this one.
    """
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # The first is torchrun's, the second is DeepSpeed's launcher's; some launchers of clusters set neither.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if processes is None and 0 < gpus <= local:
        raise ValueError(
            f"there are {gpus} GPUs and none for local rank {local}; start as many processes as there are GPUs, "
            "or set LOCAL_WORLD_SIZE to their number to train on the CPU"
        )
    cuda = gpus > 0 and (processes is None or gpus >= int(processes))
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def patience_of(timeout: float) -> timedelta:
    """When collectives give up by themselves, where a watchdog ends what stands still for `timeout` seconds.

    They wait longer than a disk may be slower on one rank than on the others.
    """
    return timedelta(seconds=max(2 * timeout, SLOW_SECONDS) + 60)


@contextmanager
def connect(*, timeout: float, first: Callable[[], None], watch: Callable[[], None]) -> Iterator[Ranks]:
    """Join the process group that the launcher describes; NCCL where every local rank has a GPU, else gloo.

    `watch` is called before the first wait for all ranks together.

    Before the ranks meet, the first one calls `first`, however long that takes; a ValueError of it is raised on all.
    Collectives give up long after `timeout` seconds: who watches for that is quicker, and knows more.
    """
    rank, world = launched()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _store(rank)
    _precede(store, rank, first)
    patience = patience_of(timeout)
    store.set_timeout(patience)
    watch()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=patience,
    )
    ranks = Ranks(rank=rank, world=world, device=device)
    # A node that came back counts from zero.
    ranks.restarts = int(ranks.most(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))

    def stop(number: int, frame: FrameType | None) -> None:
        ranks.stopping = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    yield ranks
    # Not after an error: leaving a group in order waits for ranks that may be waiting for this one.
    dist.destroy_process_group()


def _store(rank: int) -> dist.Store:
    """Where the ranks of this attempt find each other."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_PREPARING))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # One agent keeps one store for all its attempts, and the keys of ranks that are gone in it. With several agents
        # their counts differ; launch/cluster/node.sh has each attempt make a store of its own.
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _precede(store: dist.Store, rank: int, first: Callable[[], None]) -> None:
    """Have the first rank call `first` and the others wait for it."""
    key = "symdist/first"
    if rank == 0:
        try:
            first()
        except ValueError as error:
            store.set(key, f"error {error}")
            raise AllRanksError(str(error)) from error
        store.set(key, "done")
        return
    store.wait([key], _PREPARING)
    told = store.get(key).decode()
    if told != "done":
        raise AllRanksError(told.removeprefix("error "))
