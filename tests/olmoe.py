"""What ranks run for the model test: OLMoE-tiny under FSDP2, its steps and their collectives."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from symdist import build_optimizer, clip_grad_norm_
from symdist.exchange import Collectives, Counting
from symdist.models import blocks, build

STEPS = 3


def stepped(mesh: DeviceMesh, layers: int, recipe: Any) -> tuple[int, list[float]]:
    """Collectives of one optimizer step, and the mean loss over ranks before each of three steps."""
    model = sized(layers)
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    counting = Counting(inner=Collectives())
    optimizer = build_optimizer(model, recipe, transport=counting)
    losses = []
    for step in range(STEPS):
        tokens = batches()[step].chunk(mesh.size())[mesh.get_local_rank()]
        loss = loss_of(model, tokens)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        counting.log.clear()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return counting.collectives, losses


def alone(layers: int, recipe: Any) -> list[float]:
    """The losses of the unsharded model on the whole batch."""
    model = sized(layers)
    optimizer = build_optimizer(model, recipe)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batches()[step])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sized(layers: int) -> Any:
    """OLMoE-tiny of some depth, the same weights wherever it is built."""
    return build("olmoe-tiny", vocabulary=515, overrides={"num_hidden_layers": layers}, seed=1)


def batches() -> torch.Tensor:
    """Six sequences of 17 tokens a step."""
    return torch.randint(515, (STEPS, 6, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
