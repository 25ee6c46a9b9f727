"""From a model and a recipe to its optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from symdist.exchange import Transport
from symdist.gradients.nonfinite import NonFinite
from symdist.optimizer import BUCKET_BYTES, SymDist
from symdist.routing.recipes import RecipeLike
from symdist.routing.route import route


def build_optimizer(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    nonfinite: NonFinite = "raise",
    bucket_bytes: int = BUCKET_BYTES,
    communication_dtype: torch.dtype | None = None,
    world: Any = None,
    replicas: Any = None,
    transport: Transport | None = None,
    **overrides: Mapping[str, Any],
) -> SymDist:
    """`SymDist(route(model, recipe, **overrides), …)`; see there for the arguments and for what each raises.

    Where the model is a `DistributedDataParallel`, `replicas` are its ranks. Where it is sharded afterwards, before the
    first step, its shards are found and taken over.
    """
    if replicas is None and isinstance(model, DistributedDataParallel):
        replicas = model.process_group
    return SymDist(
        route(model, recipe, **overrides),
        nonfinite=nonfinite,
        bucket_bytes=bucket_bytes,
        communication_dtype=communication_dtype,
        world=world,
        replicas=replicas,
        transport=transport,
        model=model,
    )
