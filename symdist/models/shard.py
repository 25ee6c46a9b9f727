"""A model under FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from symdist.models.build import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, policy: MixedPrecisionPolicy | None = None) -> PreTrainedModel:
    """Shard a model in place over a one-dimensional mesh: its decoder layers one by one, then the rest."""
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return model
