"""What ranks run for the test of numbers on shards: rows are split, and one rank's part is of another size."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from symdist import SymDist, clip_grad_norm_
from tests.cases import CASES, tensors

# What the rows of the last rank's part are multiplied by.
LAST = {"zero": 0.0, "denormal": 1e-42, "tiny": 1e-30, "huge": 1e30}


def stepped(mesh: DeviceMesh | None, last: str, world: int) -> tuple[list[Tensor], float]:
    """Every case in float32, stepped by gradients whose last rows are of another size; weights and the first norm."""
    parameters, groups, gradients = [], [], []
    for case, (_, group) in CASES.items():
        weight, drawn = tensors(case)
        whole = torch.zeros_like(weight).float()
        rows = -(-len(weight) // world) * (world - 1)
        for gradient in drawn:
            gradient[rows:] *= LAST[last]
        parameters.append(nn.Parameter(whole if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])))
        gradients.append([gradient.float() for gradient in drawn])
        groups.append({"params": [(case, parameters[-1])], "lr": 0.1, **copy.deepcopy(group)})
    optimizer = SymDist(groups)
    norms = []
    for step in range(len(gradients[0])):
        for parameter, drawn in zip(parameters, gradients, strict=True):
            whole = drawn[step]
            parameter.grad = whole.clone() if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])
        norms.append(float(clip_grad_norm_(parameters, float("inf"))))
        optimizer.step()
    ends = [p.full_tensor() if isinstance(p, DTensor) else p for p in map(torch.Tensor.detach, parameters)]
    return ends, norms[0]
