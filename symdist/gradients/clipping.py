"""Gradient clipping by the global gradient norm, for any mix of layouts and meshes."""

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
    """Scale all gradients in place so that their global 2-norm is at most `max_norm`.

    The norm equals that of the unsharded model's gradient, whatever mix of meshes the parameters are on: shards are
    summed over the ranks that hold them, and replicas count once. A gradient whose DTensor placements differ from its
    weight's (`Partial`, or replicated where the weight is sharded) is first redistributed to the weight's placements
    and remains so. If the norm is inf or NaN, no gradient is scaled, and the optimizer applies its own policy to the
    gradients.

    All ranks that share a parameter must call it, with the same parameters in the same order, and so must all ranks of
    `pipeline_group`. It communicates two numbers per set of ranks, and more only if gradients must be redistributed.

    Args:
        parameters: The parameters, plain tensors or DTensors. A parameter without a gradient contributes zero.
        max_norm: The bound, greater than 0. `float("inf")` measures the norm without clipping.
        pipeline_group: A process group or mesh along which ranks hold *different* parameters of the model, as pipeline
            stages do; their norms are included. None by default.
        transport: The transport that runs the collectives, for example to count them; `TorchTransport()` by default.

    Returns:
        The norm before clipping, a 0-d float32 tensor.

    Raises:
        ValueError: If `max_norm` is not positive, `pipeline_group` is neither a process group nor a mesh, or the layout
            of a parameter or gradient is not supported.

    Example:
        >>> loss.backward()
        >>> norm = symdist.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
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
    # If the norm is inf or NaN, leave the gradients unchanged. The optimizer has its own policy for them.
    if gradients and factor < 1 and norm.isfinite():
        torch._foreach_mul_(gradients, factor)
    return norm.float()


@dataclass
class _Held:
    """Parameters that are held by the same ranks in the same number of copies.

    Attributes:
        group: The ranks; None for this rank alone.
        copies: The number of copies.
        parameters: `(name, parameter)` pairs.
        found: `[2]`: the squared norm of the gradients, and whether any rank has a gradient that must first be
            redistributed.
    """

    group: Group | None
    copies: int
    parameters: list[tuple[str, Tensor]]
    found: Tensor

    def measure(self, elsewhere: set[int], transport: Transport) -> None:
        """Compute `found`, summed over the ranks of the group.

        All ranks of the group must call it.

        Args:
            elsewhere: The ids of the parameters whose gradients must first be redistributed. These do not add to the
                norm but set the flag.
            transport: The transport that runs the all-reduce.
        """
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
    """Group the parameters by ranks and copies, sorted so that all ranks run their collectives in the same order."""
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
