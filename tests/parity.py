"""What ranks run for the parity tests: every case in one optimizer, three steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from symdist import SymDist
from tests.cases import CASES, LR, STEPS, tensors

PLACEMENTS = ("auto", "local", "reduce", "owner")
COPIES = 2
"""Parameters of each case, so that every stack holds several."""


def train(place: Callable[[Tensor], Tensor], dtype: torch.dtype, placements: tuple[str, ...], **options: Any) -> Any:
    """Final weights by (case, copy, placement), and the optimizer; a placement a case cannot have is left out."""
    groups, drawn = [], {}
    for case, (_, group) in CASES.items():
        for placement in placements:
            parameters = []
            for copy in range(COPIES):
                weight, gradients = tensors(case, copy)
                parameter = nn.Parameter(place(weight.to(dtype)))
                drawn[case, copy, placement] = (parameter, [place(gradient.to(dtype)) for gradient in gradients])
                parameters.append((f"{case}/{copy}/{placement}", parameter))
            candidate = {"params": parameters, "lr": LR, "placement": placement, **group}
            try:
                SymDist([dict(candidate)])
            except ValueError as error:
                if "cannot run with placement" not in str(error):
                    raise
                for copy in range(COPIES):
                    del drawn[case, copy, placement]
            else:
                groups.append(candidate)
    optimizer = SymDist(groups, **options)
    for step in range(STEPS):
        for parameter, gradients in drawn.values():
            parameter.grad = gradients[step]
        optimizer.step()
    return {key: parameter.detach() for key, (parameter, _) in drawn.items()}, optimizer


def sharded(mesh: DeviceMesh, dtype: torch.dtype, dim: int, wave_bytes: int) -> tuple[dict, dict[str, str]]:
    """Every case split along dimension `dim` of the stored tensor (0 for vectors)."""

    def place(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(min(dim, tensor.dim() - 1))])

    weights, optimizer = train(place, dtype, PLACEMENTS, wave_bytes=wave_bytes)
    full = {key: weight.full_tensor() for key, weight in weights.items() if isinstance(weight, DTensor)}
    return full, optimizer.placements()


def alone(dtype: torch.dtype) -> dict:
    """The single-process oracle."""
    return train(torch.clone, dtype, ("auto",))[0]
