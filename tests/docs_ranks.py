"""What ranks run for the tests of documents: code as printed, and sharded training with it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import symdist
from symdist.tools.models import build

SHAPES = ((6, 5), (4, 5))
SIZES = (2, 0, 3)
"""Columns of the layout's ranks: uneven, and none on one."""


def model_and_tokens() -> dict[str, Any]:
    """A small mixture of experts, what it reads, and the loss."""
    torch.manual_seed(0)
    model = build("olmoe-tiny", vocabulary=64, seed=0, overrides={"num_hidden_layers": 1})
    tokens = torch.randint(64, (1, 8))
    return {"model": model, "tokens": tokens, "loss": model(input_ids=tokens, labels=tokens).loss}


def execute(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run printed code, on CPUs."""
    names = {"symdist": symdist, "cpu": torch.device("cpu"), **names}
    # FSDP1 would look for an accelerator otherwise.
    code = code.replace('"cuda"', '"cpu"').replace("use_orig_params=True", "use_orig_params=True, device_id=cpu")
    exec(code, names)
    return names


def printed(mesh: DeviceMesh, code: str, folder: str) -> bool:
    """Run code under FSDP2 unless it shards the model by itself; whether it has made an optimizer."""
    names = model_and_tokens()
    if "fully_shard" not in code and "FullyShardedDataParallel" not in code:
        fully_shard(names["model"], mesh=mesh)
        tokens = names["tokens"]
        names["loss"] = names["model"](input_ids=tokens, labels=tokens).loss
    optimizer = symdist.build_optimizer(names["model"], "olmoe")
    more = {"optimizer": optimizer, "mesh": mesh, "pipeline_group": mesh.get_group(), "folder": folder}
    return isinstance(execute(code, {**names, **more})["optimizer"], symdist.SymDist)


def whole(index: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Two whole matrices and the gradients of three steps."""
    source = torch.Generator().manual_seed(index)
    draw = [[torch.randn(shape, generator=source, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    return draw[0], draw[1:]


def column_shards(mesh: DeviceMesh | None, layout: str, use: str, rule: str) -> list[Tensor]:
    """This rank's columns after three steps by the printed layout, or whole matrices where there are no ranks."""
    weights, gradients = whole(0)
    start = 0 if mesh is None else sum(SIZES[: mesh.get_local_rank()])
    stop = SHAPES[0][1] if mesh is None else start + SIZES[mesh.get_local_rank()]
    shards = [nn.Parameter(weight[:, start:stop].clone()) for weight in weights]
    if mesh is None:
        optimizer = symdist.SymDist(shards, rule=rule, lr=1e-2)
    else:
        names = execute(layout, {})
        place = {"shards": shards, "sizes": SIZES, "process_group": mesh.get_group()}
        optimizer = execute(use.replace('"muon"', repr(rule)), {**names, **place})["optimizer"]
    for step in gradients:
        for shard, gradient in zip(shards, step, strict=True):
            shard.grad = gradient[:, start:stop].clone()
        optimizer.step()
    return [shard.detach() for shard in shards]


def flat_pieces(mesh: DeviceMesh, code: str) -> Tensor:
    """This rank's range after a step in which every gradient is one."""
    piece = nn.Parameter(torch.zeros((5, 3)[mesh.get_local_rank()]))
    piece.grad = torch.ones_like(piece)
    execute(code, {"piece": piece, "process_group": mesh.get_group()})["optimizer"].step()
    return piece.detach()
