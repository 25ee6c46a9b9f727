"""What all ranks agree on before a step: whether gradients exist, are finite, and are placed like their weights."""

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
"""Magnitudes above which a gradient counts as not finite, as its moments and sums could overflow.

`_LARGEST_FLOAT64` is for float64 gradients, `_LARGEST` for all others.
"""


FLAGS = 3
"""How many numbers `agree` sums over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know about the gradients before a step.

    Attributes:
        finite: Whether all gradients on all ranks are finite.
        elsewhere: Whether any rank has a gradient placed unlike its weight, to be redistributed first.
        any: Whether any rank has a gradient at all.
    """

    finite: bool
    elsewhere: bool
    any: bool


def ranks_that_agree(
    parameters: Iterable[Tensor], layouts: Iterable[Layout | FlatLayout], *, replicas: Group | None = None
) -> Group | None:
    """Find the ranks that must agree on whether to step.

    Candidates are the mesh that the DTensors' meshes were sliced from (so pipeline stages are included), the ranks of
    `layouts`, and `replicas`. The largest is taken.

    Args:
        parameters: The optimizer's parameters.
        layouts: Their layouts.
        replicas: The ranks that hold identical plain tensors, if known.

    Returns:
        The ranks, or None if this rank trains alone.

    Raises:
        ValueError: If no single candidate contains all the others.
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
    """Tell all ranks of `world` about the gradients of each; all of them must call it.

    It sums three numbers in one all-reduce.

    Args:
        gradients: This rank's local gradients, without those placed unlike their weights.
        world: The ranks that must agree; None if this rank is alone.
        elsewhere: Whether this rank has gradients placed unlike their weights.
        some: Whether this rank has any gradient.
        transport: What runs the all-reduce.

    Returns:
        The same answer on all ranks.
    """
    device = gradients[0].device if gradients else torch.device("cpu")
    flags = torch.stack([~_all_finite(gradients, device), *torch.tensor([elsewhere, some], device=device)]).float()
    if world is not None and world.size > 1:
        transport.all_reduce(flags, group=world).wait()
    broken, away, given = flags.tolist()
    return Agreed(finite=not broken, elsewhere=bool(away), any=bool(given))


def zeroed(gradient: Tensor) -> Tensor:
    """Return the gradient with zeros in place of elements that are not finite."""
    return torch.where(gradient.abs() <= _largest(gradient), gradient, 0)


def not_finite_error(gradients: Sequence[Tensor], names: Sequence[str]) -> FloatingPointError:
    """Make the error that all ranks raise if any gradient is not finite; it names the parameters on this rank.

    Args:
        gradients: This rank's local gradients.
        names: Their parameters' names, in the same order.
    """
    here = [name for name, each in zip(names, gradients, strict=True) if not bool((each.abs() <= _largest(each)).all())]
    where = f"of {', '.join(here[:5])}{' and others' if len(here) > 5 else ''}" if here else "held by another rank"
    return FloatingPointError(
        f"a gradient {where} is not finite; no weight was changed. Numbers beyond {_LARGEST:.0e} count as such. "
        "nonfinite='skip' leaves such steps out, nonfinite='zero' drops the elements"
    )


def _largest(gradient: Tensor) -> float:
    return _LARGEST_FLOAT64 if gradient.dtype == torch.float64 else _LARGEST


def _all_finite(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether all are finite, a 0-d bool tensor on `device` for the caller to send with its other flags."""
    by_limit: dict[float, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            by_limit.setdefault(_largest(gradient), []).append(gradient)
    fine = torch.ones((), dtype=torch.bool, device=device)
    for limit, held in by_limit.items():
        # The 2-norm is the faster test, but the squares of finite numbers can overflow. Then the max-norm decides.
        if not bool(_norms(held, 2, device) <= limit):
            fine = fine & (_norms(held, float("inf"), device) <= limit)
    return fine


def _norms(gradients: list[Tensor], order: float, device: torch.device) -> Tensor:
    """The largest of the gradients' norms, NaN if any is NaN."""
    norms = torch._foreach_norm(gradients, order)
    return torch.stack([norm.to(device, torch.float64) for norm in norms]).amax()
