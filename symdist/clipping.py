"""Gradient clipping by the norm of the whole model's gradient, however its pieces lie."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from symdist.exchange import Collectives, Transport
from symdist.layouts import Group, check_placements, group_from, layout_of, local, same_group
from symdist.partial import finish_partial_gradients


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, *, stages: Any = None, transport: Transport | None = None
) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; return the norm before, a 0-d tensor.

    Pieces are summed over the ranks that hold them, whole gradients counted once, on any mix of meshes: the value is
    that of the unsharded model. `stages` is a process group or mesh along which ranks hold *other* parameters of the
    model, as pipeline stages do; their squares are added too. One number a process group is sent. The ranks that share
    a parameter must pass the same ones in the same order; those without a gradient count as zero. Gradients that are
    DTensors in parts (`Partial`) are summed up first, and stay so.

    Raises ValueError for `max_norm` that is not positive or a layout not supported.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; use float('inf') to measure only")
    transport = transport or Collectives()
    given = list(parameters)
    finish_partial_gradients(given, transport=transport)
    groups: dict[Hashable, Group | None] = {}
    squares: dict[Group | None, Tensor] = {}
    gradients = []
    for i, parameter in enumerate(given):
        key = same_group(parameter)
        if key not in groups:
            groups[key] = layout_of(parameter, name=f"parameter {i}").cells
            squares.setdefault(groups[key], torch.zeros(1, dtype=torch.float64, device=parameter.device))
        if parameter.grad is not None:
            check_placements(f"parameter {i}", parameter, parameter.grad)
            gradient = local(parameter.grad)
            gradients.append(gradient)
            so_far = squares[groups[key]]
            so_far += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().to(so_far.device)
    split = sorted((group for group in squares if group is not None), key=lambda group: group.ranks)
    for group in split:
        transport.all_reduce(squares[group], group=group).wait()
    total = torch.stack(list(squares.values())).sum(0) if squares else torch.zeros(1, dtype=torch.float64)
    if stages is not None:
        transport.all_reduce(total, group=group_from(stages)).wait()
    norm = total.sqrt().squeeze(0)
    factor = max_norm / (float(norm) + 1e-6)
    # A norm that is not finite scales nothing: the optimizer then finds the gradient as it came.
    if gradients and factor < 1 and norm.isfinite():
        torch._foreach_mul_(gradients, factor)
    return norm.float()
