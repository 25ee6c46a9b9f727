"""Gradient clipping by the norm of the whole model's gradient, however its pieces lie."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from symdist.exchange import Collectives, Transport
from symdist.layouts import Group, check_placements, layout_of, local, same_group


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, *, transport: Transport | None = None) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; return the norm before, a 0-d tensor.

    Pieces are summed over the ranks that hold them, whole gradients counted once: the value is that of the unsharded
    model. One number a process group is sent. Every rank must pass the same parameters in the same order; those
    without a gradient count as zero. Raises ValueError for `max_norm` that is not positive or a layout not supported.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; use float('inf') to measure only")
    transport = transport or Collectives()
    groups: dict[Hashable, Group | None] = {}
    squares: dict[Group | None, Tensor] = {}
    gradients = []
    for i, parameter in enumerate(parameters):
        key = same_group(parameter)
        if key not in groups:
            split = layout_of(parameter, name=f"parameter {i}").split
            groups[key] = split.group if split is not None else None
            squares.setdefault(groups[key], torch.zeros(1, dtype=torch.float64, device=parameter.device))
        if parameter.grad is not None:
            check_placements(f"parameter {i}", parameter, parameter.grad)
            gradient = local(parameter.grad)
            gradients.append(gradient)
            so_far = squares[groups[key]]
            so_far += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().to(so_far.device)
    for group in sorted((group for group in squares if group is not None), key=lambda group: group.ranks):
        transport.all_reduce(squares[group], group=group).wait()
    total = torch.stack(list(squares.values())).sum().sqrt() if squares else torch.zeros(())
    factor = max_norm / (float(total) + 1e-6)
    # A norm that is not finite scales nothing: the optimizer then finds the gradient as it came.
    if gradients and factor < 1 and total.isfinite():
        torch._foreach_mul_(gradients, factor)
    return total.float()
