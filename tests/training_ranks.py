"""What ranks run for the training test: OLMoE-tiny for fifty steps on a mesh, under DDP, or nowhere sharded."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from symdist import build_optimizer, clip_grad_norm_
from symdist.exchange import CountingTransport, TorchTransport
from symdist.tools.models import build, shard
from tests.models.parallel_ranks import Mesh, full, mesh_of

STEPS = 50
WARMUP = 20
VOCABULARY = 128


class Run(NamedTuple):
    """What a rank saw: losses of its share and norms of the gradient by step, and full weights in the end by name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def alone(recipe: Any, dtype: torch.dtype) -> Run:
    """The model that is nowhere sharded, on the whole batch."""
    model = small(2, dtype)
    return train(model, build_optimizer(model, recipe))


def together(world: DeviceMesh, shape: Mesh, recipe: Any, dtype: torch.dtype) -> Run:
    """The same on a mesh of this shape; `ddp` as its only dimension is DistributedDataParallel."""
    mesh = mesh_over(world, shape)
    model = _placed(small(2, dtype), mesh)
    return train(model, build_optimizer(model, recipe), mesh)


def counted(world: DeviceMesh, shape: Mesh, layers: int, recipe: Any) -> tuple[list[str], list[str]]:
    """The collectives of clipping and of a step on a model of some depth."""
    mesh = mesh_over(world, shape)
    model = _placed(small(layers, torch.float32), mesh)
    counting = CountingTransport(inner=TorchTransport())
    optimizer = build_optimizer(model, recipe, transport=counting)
    kinds = []
    for tokens in batches()[:2]:
        _backward(model, _share(tokens, mesh))
        counting.log.clear()
        clip_grad_norm_(model.parameters(), 1.0, transport=counting)
        clipping = [moved.kind for moved in counting.log]
        counting.log.clear()
        optimizer.step()
        kinds.append((clipping, [moved.kind for moved in counting.log]))
    assert kinds[0] == kinds[1]
    return kinds[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh | None = None) -> Run:
    """Fifty steps; the learning rates rise to those of the recipe over the first twenty."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    losses, norms = [], []
    for tokens in batches():
        losses.append(_backward(model, _share(tokens, mesh)))
        norms.append(float(clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return Run(losses, norms, weights_of(model))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(parameter) for name, parameter in model.named_parameters()}


def small(layers: int, dtype: torch.dtype) -> Any:
    """OLMoE-tiny of some depth and half the width, the same weights wherever it is built."""
    overrides: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 64}
    if dtype == torch.float64:
        # transformers' grouped products know no float64.
        overrides["experts_implementation"] = "eager"
    return build("olmoe-tiny", vocabulary=VOCABULARY, overrides=overrides, dtype=dtype, seed=1)


def batches() -> Tensor:
    """Eight sequences of 17 tokens a step, of a text where each token is followed by one of four others."""
    draw = torch.Generator().manual_seed(0)
    followers = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=draw)
    chances = torch.tensor([0.7, 0.2, 0.07, 0.03]).expand(STEPS * 8, 4)
    tokens = [torch.randint(VOCABULARY, (STEPS * 8,), generator=draw)]
    for _ in range(16):
        tokens.append(followers[tokens[-1], torch.multinomial(chances, 1, generator=draw)[:, 0]])
    return torch.stack(tokens, dim=1).view(STEPS, 8, 17)


def mesh_over(world: DeviceMesh, shape: Mesh) -> DeviceMesh:
    """A mesh of a shape; over fewer ranks than there are, the one that is there, named anew."""
    if len(shape) > 1:
        return mesh_of(shape)
    return DeviceMesh.from_group(world.get_group(), "cpu", mesh_dim_names=tuple(shape))


def _placed(model: Any, mesh: DeviceMesh) -> nn.Module:
    if mesh.mesh_dim_names == ("ddp",):
        return DistributedDataParallel(model, process_group=mesh.get_group())
    return shard(model, mesh)


def _share(tokens: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sequences of this rank; ranks of `tp` have the same."""
    ranks, index = 1, 0
    for name in () if mesh is None else mesh.mesh_dim_names or ():
        if mesh is not None and name != "tp":
            ranks, index = ranks * mesh[name].size(), index * mesh[name].size() + mesh.get_local_rank(name)
    return tokens.chunk(ranks)[index]


def _backward(model: nn.Module, tokens: Tensor) -> float:
    """The loss, after its backward."""
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())
