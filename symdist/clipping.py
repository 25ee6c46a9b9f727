"""Gradient clipping by the norm of the whole model's gradient, however its pieces lie."""

from collections.abc import Iterable

import torch
from torch import Tensor

from symdist.exchange import Collectives, Transport
from symdist.layouts import Group, layout_of, local


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
    squares: dict[Group | None, Tensor] = {}
    gradients = []
    for i, parameter in enumerate(parameters):
        split = layout_of(parameter, name=f"parameter {i}").split
        group = split.group if split is not None else None
        so_far = squares.setdefault(group, torch.zeros(1, dtype=torch.float64, device=parameter.device))
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradients.append(gradient)
            so_far += gradient.float().square().sum(dtype=torch.float64).to(so_far.device)
    for group in sorted((g for g in squares if g is not None), key=lambda g: g.ranks):
        transport.all_reduce(squares[group], group=group).wait()
    total = torch.stack([value for value in squares.values()]).sum().sqrt() if squares else torch.zeros(())
    if gradients:
        factor = (max_norm / (total + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_(gradients, float(factor))
    return total.float()
