"""The ranks of a run: process group, device, mesh, and what they agree on."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(kw_only=True)
class Ranks:
    """This process among the others. `stopping` turns true once SIGTERM, SIGUSR1 or SIGINT reached this rank."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    stopping: bool = field(default=False)

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def agree_to_stop(self) -> bool:
        """Whether any rank was told to stop; the same on all."""
        return bool(self.sum(torch.tensor([float(self.stopping)], device=self.device)) > 0)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read after it counts the work before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher tells them; ValueError where there was none."""
    if "RANK" not in os.environ:
        script = f"launch/{Path(sys.argv[0]).name}"
        raise ValueError(f"start this with torchrun, as in: torchrun --nproc_per_node=2 {script}")
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


@contextmanager
def connect() -> Iterator[Ranks]:
    """Join the process group that the launcher describes; NCCL where every local rank has a GPU, else gloo."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device, mesh=mesh)

    def stop(number: int, frame: FrameType | None) -> None:
        ranks.stopping = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    yield ranks
    # Not after an error: leaving a group in order waits for ranks that may be waiting for this one.
    dist.destroy_process_group()
