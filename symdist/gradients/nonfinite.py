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
"""Magnitudes above which a gradient is treated as not finite, because its moments and sums could overflow.

`_LARGEST_FLOAT64` applies to float64 gradients, `_LARGEST` to all others.
"""


FLAGS = 3
"""The number of values that `agree` sums over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know about the gradients before a step.

    Attributes:
        finite: Whether all gradients on all ranks are finite.
        elsewhere: Whether any rank has a gradient whose placements differ from its weight's and that must be
            redistributed first.
        any: Whether any rank has a gradient.
    """

    finite: bool
    elsewhere: bool
    any: bool


def ranks_that_agree(
    parameters: Iterable[Tensor], layouts: Iterable[Layout | FlatLayout], *, replicas: Group | None = None
) -> Group | None:
    """Find the ranks that must agree on whether to step.

    The candidates are the root meshes that the DTensors' meshes were sliced from (which include pipeline stages), the
    groups of `layouts`, and `replicas`. The largest candidate is chosen.

    Args:
        parameters: The optimizer's parameters.
        layouts: The layouts of the parameters.
        replicas: The ranks that hold identical plain tensors; None (default) if not known.

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
    outside = [group for group in groups if not set(group.ranks) <= set(largest.ranks)]
    if outside:
        raise ValueError(
            f"some parameters are on ranks {largest.ranks} and others on ranks {outside[0].ranks}; pass the process "
            "group or device mesh of all ranks that train this model as process_group="
        )
    return largest


def agree(
    gradients: Sequence[Tensor],
    world: Group | None,
    *,
    elsewhere: bool,
    has_gradient: bool,
    transport: Transport,
) -> Agreed:
    """Combine what each rank of `world` knows about its gradients.

    All ranks of `world` must call it. It sums three numbers in one all-reduce.

    Args:
        gradients: This rank's local gradients, except those whose placements differ from their weights'.
        world: The ranks that must agree; None if this rank trains alone.
        elsewhere: Whether this rank has gradients whose placements differ from their weights'.
        has_gradient: Whether this rank has any gradient.
        transport: The transport that runs the all-reduce.

    Returns:
        The combined knowledge, the same on all ranks.
    """
    device = gradients[0].device if gradients else torch.device("cpu")
    flags = torch.stack(
        [~_all_finite(gradients, device), *torch.tensor([elsewhere, has_gradient], device=device)]
    ).float()
    share(flags, world, transport)
    broken, misplaced, present = flags.tolist()
    return Agreed(finite=not broken, elsewhere=bool(misplaced), any=bool(present))


def share(flags: Tensor, world: Group | None, transport: Transport) -> None:
    """Add up the flags of all ranks, in place; plans call it with empty ones.

    Args:
        flags: `[FLAGS]`.
        world: The ranks that must agree; None if this rank trains alone.
        transport: The transport that runs the all-reduce.
    """
    if world is not None and world.size > 1:
        transport.all_reduce(flags, group=world).wait()


def zeroed(gradient: Tensor) -> Tensor:
    """Return a gradient with zeros in place of the elements that are not finite."""
    return torch.where(gradient.abs() <= _largest(gradient), gradient, 0)


def not_finite_error(gradients: Sequence[Tensor], names: Sequence[str]) -> FloatingPointError:
    """Make the error that all ranks raise if any gradient is not finite.

    The message names parameters on this rank whose gradients are not finite, if there are any.

    Args:
        gradients: This rank's local gradients.
        names: The names of their parameters, in the same order.

    Returns:
        The error; it is not raised here.
    """
    bad = [name for name, grad in zip(names, gradients, strict=True) if not bool((grad.abs() <= _largest(grad)).all())]
    place = f"of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}" if bad else "held by another rank"
    return FloatingPointError(
        f"a gradient {place} is not finite; no weight was changed. Not finite means inf, NaN or larger than "
        f"{_LARGEST:.0e} ({_LARGEST_FLOAT64:.0e} in float64). Pass nonfinite='skip' to skip such "
        "steps, or nonfinite='zero' to set these elements to zero"
    )


def _largest(gradient: Tensor) -> float:
    return _LARGEST_FLOAT64 if gradient.dtype == torch.float64 else _LARGEST


def _all_finite(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return whether all gradients are finite.

    Returns:
        A 0-d bool tensor on `device`, which the caller can send with its other flags.
    """
    by_limit: dict[float, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            by_limit.setdefault(_largest(gradient), []).append(gradient)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for limit, members in by_limit.items():
        # The 2-norm is the faster test, but the squares of finite numbers can overflow. Then the max-norm decides.
        if not bool(_norms(members, 2, device) <= limit):
            finite = finite & (_norms(members, float("inf"), device) <= limit)
    return finite


def _norms(gradients: list[Tensor], order: float, device: torch.device) -> Tensor:
    """Return the largest of the norms of the gradients; NaN if any of them is NaN."""
    norms = torch._foreach_norm(gradients, order)
    return torch.stack([norm.to(device, torch.float64) for norm in norms]).amax()
