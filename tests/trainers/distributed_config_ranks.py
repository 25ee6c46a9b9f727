"""What ranks run where transformers lays the model out itself, by a `DistributedConfig`."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import symdist
from tests.trainers import language
from tests.trainers.language import RECIPES, Sizes, Weights, loaded


def trained(
    mesh: DeviceMesh, folder: str, kind: str, sizes: Sizes, recipe: str, dtype: torch.dtype
) -> tuple[Weights, set[str]]:
    """Weights after training, and which of them are in pieces; ranks of `tp` have the same tokens."""
    with language.exact():
        model = loaded(Path(folder) / kind, sizes, dtype)
        optimizer = symdist.build_optimizer(model, RECIPES[recipe])
        tp = sizes.get("tp_size", 1)
        share = slice(dist.get_rank() // tp, None, dist.get_world_size() // tp)
        language.train(model, optimizer, lambda step: language.batch(step, share))
        sharded = {name for name, parameter in model.named_parameters() if in_pieces(parameter)}
        return language.weights_of(model), sharded


def in_pieces(parameter: torch.Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    sizes = parameter.device_mesh.mesh.shape
    return any(not isinstance(p, Replicate) and size > 1 for p, size in zip(parameter.placements, sizes, strict=True))
