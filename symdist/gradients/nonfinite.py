"""What all ranks agree on before anything moves: whether gradients are there, finite, and where their weights are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import Transport
from symdist.layouts import FlatLayout, Group, Layout, peers

NonFinite: TypeAlias = Literal["raise", "skip", "zero"]


_LARGEST = 2.0**113
_LARGEST_FLOAT64 = 2.0**400
"""Beyond these a gradient counts as not finite: what is accumulated of it, and sums of it, could overflow."""


FLAGS = 3
"""How many numbers all ranks sum up before a step."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know of their gradients before a step."""

    finite: bool
    elsewhere: bool
    """Whether any rank has a gradient that lies otherwise than its weight, and must be put together."""
    any: bool
    """Whether any rank has a gradient at all."""


def ranks_that_agree(
    parameters: Iterable[Tensor], layouts: Iterable[Layout | FlatLayout], *, replicas: Group | None = None
) -> Group | None:
    """All ranks that must do the same about a gradient that is not finite, or None where this rank is alone.

    Those of the mesh that the parameters' meshes were sliced from, which has pipeline stages too, those of the
    `layouts` of others, and `replicas`. Raises ValueError where no one of these has them all.
    """
    meshes = {id(parameter.device_mesh): parameter for parameter in parameters if isinstance(parameter, DTensor)}
    groups = [peers(parameter) for parameter in meshes.values()] + ([replicas] if replicas is not None else [])
    groups += list({layout.group for layout in layouts if layout.group is not None})
    if not groups:
        return None
    largest = max(groups, key=lambda group: (group.size, group.ranks))
    strays = [group for group in groups if not set(group.ranks) <= set(largest.ranks)]
    if strays:
        raise ValueError(
            f"parameters lie on unrelated meshes, of ranks {largest.ranks} and {strays[0].ranks}; give "
            "process_group=, the "
            "ranks that train this model"
        )
    return largest


def agree(
    gradients: Sequence[Tensor],
    world: Group | None,
    *,
    elsewhere: bool,
    some: bool,
    transport: Transport,
) -> Agreed:
    """Three numbers summed over `world`: all its ranks call it, and all learn the same.

    `gradients` are this rank's, but for those that are `elsewhere`; `some` says that it has any.
    """
    device = gradients[0].device if gradients else torch.device("cpu")
    flags = torch.stack([~_all_finite(gradients, device), *torch.tensor([elsewhere, some], device=device)]).float()
    if world is not None and world.size > 1:
        transport.all_reduce(flags, group=world).wait()
    broken, away, given = flags.tolist()
    return Agreed(finite=not broken, elsewhere=bool(away), any=bool(given))


def zeroed(gradient: Tensor) -> Tensor:
    """A gradient with zeros for what is not finite."""
    return torch.where(gradient.abs() <= _largest(gradient), gradient, 0)


def not_finite_error(gradients: Sequence[Tensor], names: Sequence[str]) -> FloatingPointError:
    """What all ranks raise where any has a gradient that is not finite, with the names of this rank's."""
    here = [name for name, each in zip(names, gradients, strict=True) if not bool((each.abs() <= _largest(each)).all())]
    where = f"of {', '.join(here[:5])}{' and others' if len(here) > 5 else ''}" if here else "held by another rank"
    return FloatingPointError(
        f"a gradient {where} is not finite; no weight was changed. Numbers beyond {_LARGEST:.0e} count as such. "
        "nonfinite='skip' leaves such steps out, nonfinite='zero' drops the elements"
    )


def _largest(gradient: Tensor) -> float:
    return _LARGEST_FLOAT64 if gradient.dtype == torch.float64 else _LARGEST


def _all_finite(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether all are finite, a tensor: the step reads it together with what else it must know."""
    by_limit: dict[float, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            by_limit.setdefault(_largest(gradient), []).append(gradient)
    fine = torch.ones((), dtype=torch.bool, device=device)
    for limit, held in by_limit.items():
        # A sum of squares is one fast pass, but those of finite numbers can overflow: then the largest magnitude tells.
        if not bool(_norms(held, 2, device) <= limit):
            fine = fine & (_norms(held, float("inf"), device) <= limit)
    return fine


def _norms(gradients: list[Tensor], order: float, device: torch.device) -> Tensor:
    """The largest of their norms, NaN where one is."""
    norms = torch._foreach_norm(gradients, order)
    return torch.stack([norm.to(device, torch.float64) for norm in norms]).amax()
