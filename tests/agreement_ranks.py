"""Ranks that build an optimizer with what one of them has differently."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from symdist import SymDist
from symdist.exchange import PlanError

SHAPES = {"first": (8, 6), "second": (8, 6), "wide": (4, 12)}


def differently(mesh: DeviceMesh, change: str) -> str:
    """The error on this rank where rank 1 differs from the others; empty without one."""
    odd = mesh.get_rank() == 1
    rule = "right_spectral" if change == "strategy" else "muon"
    options: dict[str, Any] = {"rule": rule, "lr": 0.1, "strategy": "owner"}
    names = list(SHAPES)
    if odd and change == "rule's option":
        options["ns_steps"] = 7
    if odd and change == "strategy":
        options["strategy"] = "reduce"
    if odd and change == "order":
        names.reverse()
    if odd and change == "budget":
        options["exchange"] = {"bucket_bytes": 1}
    shapes = SHAPES | ({"wide": (4, 24)} if odd and change == "shape" else {})
    parameters = []
    for name in names:
        weight = nn.Parameter(distribute_tensor(torch.ones(shapes[name]), mesh, [Shard(0)], src_data_rank=None))
        weight.requires_grad_(not (odd and change == "frozen" and name == "wide"))
        parameters.append((name, weight))
    try:
        SymDist(parameters, **options)
    except PlanError as error:
        return str(error)
    return ""


def groups_apart(mesh: DeviceMesh) -> bool:
    """Ranks of two groups that have different parameters build: nothing is to agree between the groups."""
    inner = mesh["inner"]
    rows = 8 if mesh["outer"].get_local_rank() else 12
    weight = nn.Parameter(distribute_tensor(torch.ones(rows, 6), inner, [Shard(0)], src_data_rank=None))
    SymDist([("weight", weight)], rule="muon", lr=0.1, strategy="owner", process_group=mesh)
    return True
