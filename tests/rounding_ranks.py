"""What ranks run for the tests of rounding: bfloat16 weights and momentum on a mesh with replicas."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from symdist import SymDist
from symdist.layouts import local

STEPS = 3


def replicas_agree(mesh: DeviceMesh, strategy: str) -> bool:
    """Whether replicas hold the same bits after some steps, and any weight has moved."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    placements = (Replicate(), Shard(0))
    parameters = [
        nn.Parameter(distribute_tensor(torch.randn(shape).bfloat16(), grid, placements))
        for shape in ((9, 6), (9, 6), (5,))
    ]
    matrix = {"rule": "muon", "strategy": strategy, "state_dtype": "bfloat16"}
    optimizer = SymDist(
        [{"params": parameters[:2], **matrix}, {"params": parameters[2:], "rule": "adamw"}],
        lr=1e-3,
        weight_rounding="stochastic",
    )
    before = [local(parameter.detach()).clone() for parameter in parameters]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            assert isinstance(parameter, DTensor)
            gradient = torch.randn(tuple(parameter.shape), generator=generator).bfloat16()
            parameter.grad = distribute_tensor(gradient, grid, placements)
        optimizer.step()
    moved = any(not torch.equal(local(new.detach()), old) for new, old in zip(parameters, before, strict=True))
    same = True
    states = [state["momentum"] for state in optimizer.state.values() if "momentum" in state]
    assert {state.dtype for state in states} == {torch.bfloat16}
    for tensor in (*parameters, *states):
        piece = local(tensor.detach()).float()
        others = [torch.empty_like(piece) for _ in range(2)]
        dist.all_gather(others, piece, group=grid.get_group("replicate"))
        same = same and torch.equal(*others)
    return same and moved
