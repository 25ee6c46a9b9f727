"""The ranks of a run: process group, device, mesh, and what they agree on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """This process's rank and the number of ranks, as torchrun tells them; ValueError where it was not torchrun."""
    if "RANK" not in os.environ:
        raise ValueError("start this with torchrun, as in: torchrun --nproc_per_node=2 launch/pretrain.py")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def connect() -> Iterator[Ranks]:
    """Join the process group that torchrun describes; NCCL where every local rank has a GPU, else gloo."""
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device, mesh=mesh)

    def stop(number: int, frame: FrameType | None) -> None:
        ranks.stopping = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    yield ranks
    # Not after an error: leaving a group in order waits for ranks that may be waiting for this one.
    dist.destroy_process_group()
