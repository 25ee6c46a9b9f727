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

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and prepares data."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def agree_to_stop(self) -> bool:
        """Whether any rank was told to stop; the same on all."""
        return bool(self.sum(torch.tensor([float(self.stopping)], device=self.device)) > 0)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read after it counts the work before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def connect() -> Iterator[Ranks]:
    """Join the process group that torchrun describes; NCCL where every local rank has a GPU, else gloo.

    Raises RuntimeError where the process was not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise RuntimeError("start this with torchrun, as in: torchrun --nproc_per_node=2 launch/pretrain.py")
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device, mesh=mesh)

        def stop(number: int, frame: FrameType | None) -> None:
            ranks.stopping = True

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, stop)
        yield ranks
    finally:
        dist.destroy_process_group()
