"""Agreement on whether gradients are finite, before anything moves."""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import Transport
from symdist.layouts import Group, peers

NonFinite: TypeAlias = Literal["raise", "skip", "zero"]


def ranks_that_agree(parameters: Iterable[Tensor], *, replicas: Group | None = None) -> Group | None:
    """All ranks that must do the same about a gradient that is not finite, or None where this rank is alone.

    Those of the mesh that the parameters' meshes were sliced from, which has pipeline stages too, and of `replicas`.
    Raises ValueError where no one mesh has them all.
    """
    meshes = {id(parameter.device_mesh): parameter for parameter in parameters if isinstance(parameter, DTensor)}
    groups = [peers(parameter) for parameter in meshes.values()] + ([replicas] if replicas is not None else [])
    if not groups:
        return None
    largest = max(groups, key=lambda group: (group.size, group.ranks))
    strays = [group for group in groups if not set(group.ranks) <= set(largest.ranks)]
    if strays:
        raise ValueError(
            f"parameters lie on unrelated meshes, of ranks {largest.ranks} and {strays[0].ranks}; say world=, the "
            "process group of all ranks that train this model"
        )
    return largest


def agree_finite(
    gradients: list[Tensor],
    names: Sequence[str],
    world: Group | None,
    *,
    transport: Transport,
    on_failure: NonFinite,
) -> bool:
    """Whether the step may go on, the same on all ranks of `world`: one number summed over it.

    With "zero", elements of `gradients` that are not finite become zero, in new tensors put in the list, and the step
    goes on: no rank need know of another's. With "raise", FloatingPointError on every rank.
    """
    if on_failure == "zero":
        for i, gradient in enumerate(gradients):
            gradients[i] = torch.where(gradient.isfinite(), gradient, 0)
        return True
    device = gradients[0].device if gradients else torch.device("cpu")
    flag = torch.tensor([float(not _all_finite(gradients))], device=device)
    if world is not None and world.size > 1:
        transport.all_reduce(flag, group=world).wait()
    if not bool(flag):
        return True
    if on_failure == "skip":
        return False
    here = [name for name, gradient in zip(names, gradients, strict=True) if not bool(gradient.isfinite().all())]
    where = f"of {', '.join(here[:5])}{' and others' if len(here) > 5 else ''}" if here else "held by another rank"
    raise FloatingPointError(
        f"a gradient {where} is not finite; no weight was changed. "
        "nonfinite='skip' leaves such steps out, nonfinite='zero' drops the elements"
    )


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    held = [gradient for gradient in gradients if gradient.numel()]
    # A sum of squares is one fast pass, but squares of finite numbers can overflow: then the largest magnitude tells.
    return _finite_norms(held, 2) or _finite_norms(held, float("inf"))


def _finite_norms(gradients: list[Tensor], order: float) -> bool:
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients, order)
    return bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all())
