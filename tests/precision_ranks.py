"""What ranks run for the tests of precision: a step in narrow arithmetic, wherever the rule runs."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from symdist import SymDist
from symdist.layouts import local

SHAPE = (131, 96)


def stepped(mesh: DeviceMesh | None, options: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """The change of a matrix in a step, whole, and the precision of its root; without a mesh, of one process."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    cut = options.pop("cut", 0)
    parameter = nn.Parameter(weight if mesh is None else distribute_tensor(weight, mesh, [Shard(cut)]))
    optimizer = SymDist([{"params": [("weight", parameter)], "lr": 1.0, **options}])
    parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, [Shard(cut)])
    before = local(parameter.detach()).clone()
    optimizer.step()
    moved = local(parameter.detach()) - before
    if mesh is not None:
        moved = DTensor.from_local(
            moved, mesh, [Shard(cut)], shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()
    return moved, optimizer.assignments()[0].precision
