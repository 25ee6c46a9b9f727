"""What ranks run for the tests of teams: one matrix at a time, three steps, where sending is slow."""

import math
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.exchange import Hardware
from symdist.layouts import FlatLayout, group_from, local
from symdist.layouts.flat import flat_bounds
from tests.cases import CASES, LR, STEPS, tensors
from tests.grids import WAYS

SLOW = Hardware(bandwidth=1.0, flops=1e15, model_flops=1e15, latency=0.0)
"""A team sends each of its ranks a part, so that none is sent much."""

Trained = tuple[Tensor, list[int]]
"""This rank's piece, and the ranks that own a unit in each job."""


def _trained(case: str, pieces: list[Tensor], **options: Any) -> Trained:
    parameter = nn.Parameter(pieces[0])
    group = {"params": [("w", parameter)], "lr": LR, "strategy": "owner", **CASES[case][1], **options}
    optimizer = SymDist([group], exchange={"hardware": SLOW})
    for gradient in pieces[1 : STEPS + 1]:
        parameter.grad = gradient
        optimizer.step()
    sizes = [job.stack.layout.shard_group.size if job.team else 1 for job in optimizer.plan().jobs]
    return local(parameter.detach()), sizes


def in_blocks(mesh: DeviceMesh, way: str, cases: list[str]) -> dict[str, Trained]:
    """Cut into blocks, or on all ranks whole."""
    found = {}
    for case in cases:
        weight, gradients = tensors(case)
        found[case] = _trained(case, [WAYS[way].place(each, mesh) for each in (weight, *gradients)])
    return found


def in_ranges(mesh: DeviceMesh, cases: list[str]) -> dict[str, Trained]:
    """Cut into ranges of elements, unequal ones, so that rows are cut too."""
    group = group_from(mesh)
    found = {}
    for case in cases:
        weight, gradients = tensors(case)
        size = math.prod(weight.shape)
        bounds = flat_bounds(3, size, part=-(-(size + 3) // group.size), ranks=group.size)
        layout = FlatLayout(shape=tuple(weight.shape), group=group, bounds=bounds)
        pieces = [layout.piece(each).clone() for each in (weight, *gradients)]
        found[case] = _trained(case, pieces, layouts=[layout])
    return found


def oracle(case: str) -> Tensor:
    """The weight that one process gets."""
    weight, gradients = tensors(case)
    return _trained(case, [weight.clone(), *gradients], strategy="auto")[0]
