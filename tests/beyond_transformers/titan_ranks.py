"""What ranks run for torchtitan's models: sharded and checkpointed by its own functions; and what one process makes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from symdist import build_optimizer, route
from symdist.param_names import plain_name
from tests.beyond_transformers import titan

RECIPE: dict[str, Any] = {
    "embedding": {"rule": "row_norm", "lr": 0.05},
    "head": {"rule": "hybrid", "centered": True, "lr": 0.01},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "muon", "view": "heads", "lr": 0.01},
    "experts": {"rule": "muon", "view": "neurons", "lr": 0.01},
    "matrix": {"rule": "muon", "lr": 0.01},
    # Gradients near zero may be rounded to either sign.
    "default": {"rule": "adamw", "lr": 1e-2, "eps": 1e-3},
}
STEPS = 2
Routing = dict[str, tuple[str, str, str]]


def described(model: nn.Module) -> Routing:
    """By a parameter's name: its role, rule and view."""
    return {
        name: (group["role"], group["rule"], str(group["view"]))
        for group in route(model, RECIPE)
        for name in group["param_names"]
    }


def alone(name: str, layers: slice) -> dict[str, Tensor]:
    """The weights after training on what two ranks have together."""
    model = titan.trainable(name, layers)
    optimizer = build_optimizer(model, RECIPE)
    for step in range(STEPS):
        for rank in range(2):
            _backward(model, step, rank)
        optimizer.step()
        optimizer.zero_grad()
    return {parameter: weight.detach() for parameter, weight in model.named_parameters()}


def trained(mesh: DeviceMesh, name: str, layers: slice) -> tuple[Routing, dict[str, Tensor]]:
    """How weights are routed, and what they are after training as torchtitan shards and checkpoints the model."""
    from torchtitan.distributed.activation_checkpoint import FullAC
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    model = titan.trainable(name, layers)
    FullAC(FullAC.Config()).apply(model)
    apply_fsdp_to_decoder(model, mesh, torch.float64, torch.float64, pp_enabled=False)
    optimizer = build_optimizer(model, RECIPE)
    for step in range(STEPS):
        _backward(model, step, dist.get_rank())
        optimizer.step()
        optimizer.zero_grad()
    weights = {plain_name(parameter): weight.detach() for parameter, weight in model.named_parameters()}
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    return described(model), {parameter: weight.full_tensor() for parameter, weight in weights.items()}


def _backward(model: Any, step: int, rank: int) -> None:
    """Gradients of the rank's tokens; torchtitan has FSDP add those of the ranks, not average them."""
    tokens, positions = titan.batch(2 * step + rank)
    titan.loss(model(tokens, positions=positions), tokens).backward()
