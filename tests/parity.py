"""What ranks run for the parity tests: every case in one optimizer, three steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.layouts import local
from tests.cases import CASES, LR, STEPS, tensors
from tests.grids import WAYS

STRATEGIES = ("auto", "local", "reduce", "owner")
COPIES = 2
"""Parameters of each case, so that every stack holds several."""


def train(place: Callable[[Tensor], Tensor], dtype: torch.dtype, strategies: tuple[str, ...], **options: Any) -> Any:
    """Final weights by (case, copy, strategy), and the optimizer; a strategy a case cannot have is left out."""
    groups, drawn = [], {}
    for case, (_, group) in CASES.items():
        for strategy in strategies:
            parameters = []
            for copy in range(COPIES):
                weight, gradients = tensors(case, copy)
                parameter = nn.Parameter(place(weight.to(dtype)))
                drawn[case, copy, strategy] = (parameter, [place(gradient.to(dtype)) for gradient in gradients])
                parameters.append((f"{case}/{copy}/{strategy}", parameter))
            candidate = {"params": parameters, "lr": LR, "strategy": strategy, **group}
            try:
                SymDist([dict(candidate)], **options)
            except ValueError as error:
                if "cannot run with strategy" not in str(error):
                    raise
                for copy in range(COPIES):
                    del drawn[case, copy, strategy]
            else:
                groups.append(candidate)
    optimizer = SymDist(groups, **options)
    for step in range(STEPS):
        for parameter, gradients in drawn.values():
            parameter.grad = gradients[step]
        optimizer.step()
    return {key: parameter.detach() for key, (parameter, _) in drawn.items()}, optimizer


def sharded(mesh: DeviceMesh, way: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict, dict[str, str]]:
    """This rank's pieces of every case laid out in one way, and where the rules ran."""
    weights, optimizer = train(lambda tensor: WAYS[way].place(tensor, mesh), dtype, STRATEGIES, **options)
    return {key: local(weight) for key, weight in weights.items()}, optimizer.strategies()


def shuffled(mesh: DeviceMesh, way: str) -> tuple[list[int], dict]:
    """The same where the mesh does not number ranks in their order: this rank's coordinate and pieces."""
    grid = DeviceMesh("cpu", torch.tensor([[3, 1], [2, 0]]), mesh_dim_names=("outer", "inner"))
    weights, _ = train(lambda tensor: WAYS[way].place(tensor, grid), torch.float64, ("auto", "owner"))
    coordinate = grid.get_coordinate()
    assert coordinate is not None
    return list(coordinate), {key: local(weight) for key, weight in weights.items()}


def replicas(mesh: DeviceMesh, dtype: torch.dtype) -> tuple[dict, dict[str, str]]:
    """Every case in plain tensors, whole on all ranks."""
    weights, optimizer = train(torch.clone, dtype, STRATEGIES, replicate_group=mesh)
    return weights, optimizer.strategies()


def alone(dtype: torch.dtype) -> dict:
    """The single-process oracle."""
    return train(torch.clone, dtype, ("auto",))[0]
