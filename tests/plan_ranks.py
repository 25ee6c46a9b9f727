"""What ranks run for the tests of plans: one step of a model on a mesh, watched on the wire."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from symdist import build_optimizer
from symdist.diagnostics.collective_counter import CollectiveCounter
from symdist.exchange import HARDWARE
from symdist.tools.models import build, shard

# No precision is faster than another, so that the meta tensors of a plan take that of the ranks' device.
EVEN = replace(HARDWARE["h100"], half_flops=None)
MUON = {"role": "matrix", "rule": "muon", "lr": 0.1}
# Of weights of olmoe-tiny: none has rows that end where ranks do.
SECTIONS: dict[str, Any] = {
    "default": {"rule": "adamw", "lr": 0.1},
    "patterns": [
        {"match": "*.q_proj.weight", **MUON, "view": {"sections": [70, 40, 18], "heads": [7, 1, 0]}},
        {"match": "*.o_proj.weight", **MUON, "view": {"sections": [100, 28]}},
        {"match": "*.gate.weight", **MUON, "rule": "row_norm", "view": {"sections": [5, 3]}},
    ],
}


def on_the_wire(
    mesh: DeviceMesh,
    model: str,
    recipe: str | dict[str, Any],
    sizes: dict[str, int],
    communication_dtype: torch.dtype | None,
    bucket_bytes: int,
) -> list[tuple[str, int, float]]:
    """Kind, group size and bytes sent of every collective that this rank starts in a step on a mesh of these sizes."""
    assert math.prod(sizes.values()) == mesh.size()
    # A line of ranks is a mesh of `dp_shard`, whatever its name; others are made of all ranks.
    line = mesh.size() < dist.get_world_size()
    grid = mesh if line else init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    sharded = shard(build(model, seed=0), grid)
    exchange = {"communication_dtype": communication_dtype, "bucket_bytes": bucket_bytes, "hardware": EVEN}
    optimizer = build_optimizer(sharded, recipe, exchange=exchange)
    for parameter in sharded.parameters():
        parameter.grad = torch.ones_like(parameter)
    with CollectiveCounter() as wire:
        optimizer.step()
    return [(passed.kind, passed.size, passed.sent) for passed in wire.log]
