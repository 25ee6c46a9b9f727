"""Gradient clipping by the norm of the whole model's gradient, however its pieces lie."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.exchange import TorchTransport, Transport
from symdist.gradients.partial_sums import bring_home, sum_up
from symdist.layouts import FlatLayout, Group, layout_of, local, same_group
from symdist.layouts.groups import Ranks, group_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    pipeline_group: Ranks | None = None,
    transport: Transport | None = None,
) -> Tensor:
    """Scale all gradients in place so that the whole model's 2-norm is at most `max_norm`.

    Works on any mix of meshes: shards are summed over the ranks that hold them, replicas counted once, so the norm is
    that of the unsharded model. It sends two numbers a process group. All ranks call it, those that share a parameter
    with the same ones in the same order. Gradients that lie otherwise than their weights, in parts (`Partial`) or
    replicated, are put where these lie, and stay so.

    Args:
        parameters: Parameters, or DTensors; those without a gradient count as zero.
        max_norm: The bound, above 0; infinity measures only.
        pipeline_group: Ranks that hold *other* parameters of the model, as pipeline stages do; their squares are added.
        transport: Replaces the collectives, to count them.

    Returns:
        The norm before, a 0-d float32 tensor, the same on all ranks. A norm that is not finite scales nothing.

    Raises:
        ValueError: For `max_norm` that is not positive, or a layout that is not supported.

    Example:
        >>> norm = symdist.clip_grad_norm_(model.parameters(), 1.0)
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; use float('inf') to measure only")
    transport = transport or TorchTransport()
    named = [(f"parameter {i}", parameter) for i, parameter in enumerate(parameters)]
    elsewhere = {id(parameter) for _, parameter in bring_home(named)}
    held = _by_ranks(named)
    device = named[0][1].device if named else torch.device("cpu")
    for each in held:
        each.measure(elsewhere, transport)
    flags = torch.stack([each.found[1].to(device) for each in held]).tolist() if held else []
    for each, flag in zip(held, flags, strict=True):
        if flag:
            sum_up(each.parameters, transport=transport)
            each.measure(set(), transport)
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for each in held:
        total += each.found[0].to(device)
    pipeline = group_of("pipeline_group", pipeline_group)
    if pipeline is not None:
        transport.all_reduce(total, group=pipeline).wait()
    norm = total.sqrt().squeeze(0)
    factor = max_norm / (float(norm) + 1e-6)
    gradients = [local(parameter.grad) for _, parameter in named if parameter.grad is not None]
    # A norm that is not finite scales nothing: the optimizer then finds the gradient as it came.
    if gradients and factor < 1 and norm.isfinite():
        torch._foreach_mul_(gradients, factor)
    return norm.float()


@dataclass
class _Held:
    """Parameters that lie on the same ranks in as many copies.

    `found` has the square of their gradients' norm, and whether any rank has one that must be put together first.
    """

    group: Group | None
    copies: int
    parameters: list[tuple[str, Tensor]]
    found: Tensor

    def measure(self, elsewhere: set[int], transport: Transport) -> None:
        """Over all ranks, each copy for its share; gradients `elsewhere` are not measured yet."""
        self.found.zero_()
        for _, parameter in self.parameters:
            if id(parameter) in elsewhere:
                self.found[1] = 1
            elif parameter.grad is not None:
                norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64)
                self.found[0] += (norm.square() / self.copies).to(self.found.device)
        if self.group is not None:
            transport.all_reduce(self.found, group=self.group).wait()


def _by_ranks(named: Iterable[tuple[str, Tensor]]) -> list[_Held]:
    """By ranks in ascending order, which is that of their collectives."""
    keys: dict[Hashable, tuple[Group | None, int]] = {}
    held: dict[tuple[Group | None, int], _Held] = {}
    for name, parameter in named:
        key = same_group(parameter)
        if key not in keys:
            layout = layout_of(parameter, name=name)
            keys[key] = layout.group, 1 if isinstance(layout, FlatLayout) else layout.num_replicas
        where = keys[key]
        if where not in held:
            found = torch.zeros(2, dtype=torch.float64, device=parameter.device)
            held[where] = _Held(group=where[0], copies=where[1], parameters=[], found=found)
        held[where].parameters.append((name, parameter))
    return sorted(held.values(), key=lambda each: (() if each.group is None else each.group.ranks, each.copies))
