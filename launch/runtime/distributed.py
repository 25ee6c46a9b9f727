"""The ranks of a run: process group, device, and collectives on small values."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

import launch
from launch.runtime.signals import StopSignals
from launch.runtime.watchdog import SLOW_SECONDS
from symdist.engines.agreement import gather, gather_unless_failed

T = TypeVar("T")

# What torchrun and DeepSpeed's launcher set; ranks that a shell starts may outlive it.
_LAUNCHERS_SET = {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"}
_PR_SET_PDEATHSIG = 1

# The other ranks wait while rank 0 prepares a corpus, which may be large.
_PREPARING = timedelta(days=2)


class AllRanksError(ValueError):
    """An error that all ranks raise together because one of them hit it; only rank 0 needs to print it."""


@dataclass(kw_only=True)
class Ranks:
    """This process and its place among the ranks.

    Attributes:
        rank: This rank's number.
        world: Number of ranks.
        device: This rank's device.
        signals: The signals that ask this rank to stop.
        restarts: How often torchrun restarted the ranks; the largest count of any node.
    """

    rank: int
    world: int
    device: torch.device
    signals: StopSignals
    restarts: int = 0

    @property
    def stopping(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self.signals.requested

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place, and return them; all ranks must call it."""
        dist.all_reduce(values)
        return values

    def most(self, value: float) -> float:
        """Return the largest `value` of all ranks; all ranks must call it."""
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order; all ranks must call it."""
        return gather(value)

    def everywhere(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; all ranks must call this.

        Returns:
            What `function` returned on this rank.

        Raises:
            AllRanksError: On all ranks, if `function` raised ValueError on any of them.
        """
        result, failure = None, None
        try:
            result = function()
        except ValueError as error:
            failure = str(error)
        gather_unless_failed(None, failure, error=AllRanksError)
        return cast(T, result)

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a clock read afterwards includes its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher ends, by SIGKILL too; at once if it has ended already.

    Ranks are in sessions of their own and would train on, beside those that are started next. On Linux only, and only
    under torchrun or DeepSpeed's launcher. What a rank starts does not inherit this and calls it too.
    """
    if not _LAUNCHERS_SET & os.environ.keys():
        return
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # The kernel does not tell of what was before.
    if os.getppid() != launch.LAUNCHER or not _may_launch(launch.LAUNCHER):
        os.kill(os.getpid(), signal.SIGKILL)


def _may_launch(process: int) -> bool:
    """Return False of the system's first process, which adopts orphans, unless it is Python, as in a container."""
    if process != 1:
        return True
    try:
        return os.path.samefile("/proc/1/exe", "/proc/self/exe")
    except PermissionError:
        return False


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, from the launcher's environment variables.

    Raises:
        ValueError: If no launcher set them.
    """
    if "RANK" not in os.environ:
        module = f"launch.{Path(sys.argv[0]).stem}"
        raise ValueError(f"start this with torchrun, as in: torchrun --nproc_per_node=2 -m {module}")
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise ValueError(f"the launcher set RANK but not {' and '.join(missing)}; start this with torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_device() -> torch.device:
    """Return this process's GPU if every process of its machine has one, else the CPU.

    Raises:
        ValueError: If this process has no GPU but others have one, and the launcher does not set the process count.
    """
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # torchrun sets the first, DeepSpeed's launcher the second; some cluster launchers set neither.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if processes is None and 0 < gpus <= local:
        raise ValueError(
            f"there are {gpus} GPUs and none for local rank {local}; start as many processes as there are GPUs, or, to "
            "train on the CPU, set LOCAL_WORLD_SIZE to the number of processes"
        )
    cuda = gpus > 0 and (processes is None or gpus >= int(processes))
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def patience_of(timeout: float) -> timedelta:
    """Return the timeout of collectives in a run whose watchdog has a limit of `timeout` seconds.

    It is longer than the watchdog's limits, so that a rank whose disk is slow does not make the others give up.
    """
    return timedelta(seconds=max(2 * timeout, SLOW_SECONDS) + 60)


@contextmanager
def connect(
    *, timeout: float, signals: StopSignals, first: Callable[[], None], watch: Callable[[], None]
) -> Iterator[Ranks]:
    """Join the process group that the launcher describes; all ranks must enter it.

    The backend is NCCL if every process of the machine has a GPU, else gloo.

    Args:
        timeout: The watchdog's limit in seconds; collectives time out later, see `patience_of`, because the watchdog
            gives the better message.
        signals: Answers signals.
        first: Called on rank 0 before the ranks meet, while the others wait up to two days.
        watch: Called on every rank before the process group is made, to start the watchdog.

    Yields:
        The ranks of the run.

    Raises:
        ValueError: If the launcher's variables are missing or there is no device, see `launched` and `local_device`.
        AllRanksError: On all ranks, if `first` raised ValueError.
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
    ranks = Ranks(rank=rank, world=world, device=device, signals=signals)
    # A node that was replaced counts from zero, so take the largest count.
    ranks.restarts = int(ranks.most(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    yield ranks
    # Not after an error: destroying the group waits for ranks that may be waiting for this one.
    dist.destroy_process_group()


def _store(rank: int) -> dist.Store:
    """Return the store through which the ranks of this attempt find each other."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_PREPARING))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # One torchrun agent keeps one store for all attempts, with the keys of earlier ranks, so each attempt gets its
        # own prefix. Several agents can have different restart counts; for them launch/cluster/node.sh has each attempt
        # make its own store.
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _precede(store: dist.Store, rank: int, first: Callable[[], None]) -> None:
    """Call `first` on rank 0 while the other ranks wait for it."""
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
    outcome = store.get(key).decode()
    if outcome != "done":
        raise AllRanksError(outcome.removeprefix("error "))
