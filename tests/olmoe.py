"""What ranks run for the model test: OLMoE-tiny under FSDP2 and DDP, its steps and their collectives."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from symdist import SymDist, build_optimizer, clip_grad_norm_
from symdist.exchange import CountingTransport, TorchTransport
from symdist.tools.models import build, shard
from tests.plan_ranks import EVEN

STEPS = 3


def stepped(mesh: DeviceMesh, layers: int, recipe: Any) -> tuple[int, list[float]]:
    """FSDP2: collectives of one optimizer step, and this rank's loss before each of three steps."""
    model = shard(sized(layers), mesh)
    counting = CountingTransport(inner=TorchTransport())
    optimizer = build_optimizer(model, recipe, transport=counting, exchange={"hardware": EVEN})
    found = losses(model, optimizer, mesh, counting)
    return counting.collectives, found


def replicated(mesh: DeviceMesh, layers: int, recipe: Any) -> tuple[float, list[float]]:
    """DDP: the same, with the sum over all weights in the end instead of collectives."""
    model = DistributedDataParallel(sized(layers), process_group=mesh.get_group())
    found = losses(model, build_optimizer(model, recipe, exchange={"hardware": EVEN}), mesh)
    return float(sum(parameter.detach().double().sum() for parameter in model.parameters())), found


def alone(layers: int, recipe: Any) -> list[float]:
    """The losses of the unsharded model on the whole batch."""
    model = sized(layers)
    return losses(model, build_optimizer(model, recipe, exchange={"hardware": EVEN}))


def losses(
    model: nn.Module, optimizer: SymDist, mesh: DeviceMesh | None = None, counting: CountingTransport | None = None
) -> list[float]:
    """Train on this rank's share of each batch; `counting` is left with the last step's collectives."""
    found = []
    for batch in batches():
        tokens = batch if mesh is None else batch.chunk(mesh.size())[mesh.get_local_rank()]
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        if counting is not None:
            counting.log.clear()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def sized(layers: int) -> Any:
    """OLMoE-tiny of some depth, the same weights wherever it is built."""
    return build("olmoe-tiny", vocabulary=515, overrides={"num_hidden_layers": layers}, seed=1)


def batches() -> torch.Tensor:
    """Six sequences of 17 tokens a step."""
    return torch.randint(515, (STEPS, 6, 17), generator=torch.Generator().manual_seed(0))
