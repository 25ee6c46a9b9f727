"""Gradient clipping by the global gradient norm, for any mix of layouts and meshes."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.exchange import TorchTransport, Transport
from symdist.gradients.nonfinite import may_read
from symdist.gradients.partial_sums import bring_home, in_doubt, sum_up
from symdist.layouts import Group, layout_of, local, same_group
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
        The norm before clipping, a 0-d float64 tensor: that of float32 gradients may be outside the range of float32.

    Raises:
        ValueError: If `max_norm` is not positive, `pipeline_group` is neither a process group nor a mesh, or the layout
            of a parameter or gradient is not supported.

    Example:
        >>> loss.backward()
        >>> norm = symdist.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; use float('inf') to measure the norm without clipping")
    transport = transport or TorchTransport()
    named = [(f"parameter {i}", parameter) for i, parameter in enumerate(parameters)]
    misplaced = {id(parameter) for _, parameter in bring_home(named)}
    groups = _by_ranks(named)
    device = named[0][1].device if named else torch.device("cpu")
    read = may_read(parameter for _, parameter in named)
    for group in groups:
        group.measure(misplaced, transport)
        doubtful = read or in_doubt(parameter for _, parameter in group.parameters)
        elsewhere = any(id(parameter) in misplaced for _, parameter in group.parameters)
        group.elsewhere = bool(group.totals[1]) if doubtful else elsewhere
    for group in groups:
        if group.elsewhere:
            sum_up(group.parameters, transport=transport, read=read)
            group.measure(set(), transport)
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for group in groups:
        total += group.totals[0].to(device)
    pipeline = group_of("pipeline_group", pipeline_group)
    if pipeline is not None:
        transport.all_reduce(total, group=pipeline).wait()
    norm = total.sqrt().squeeze(0)
    # If the norm is inf or NaN, leave the gradients unchanged. The optimizer has its own policy for them.
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1), 1)
    if read and factor == 1:
        return norm
    for gradients in _by_kind(local(parameter.grad) for _, parameter in named if parameter.grad is not None):
        dtype = gradients[0].dtype
        # A factor outside the range of the dtype, where it would be 0, is applied in two parts. In float16 that is one
        # that training meets; in others it takes gradients of 1e38, for which no accelerator makes a second pass.
        parts = 2 if (factor < torch.finfo(dtype).tiny if read else dtype == torch.float16) else 1
        for _ in range(parts):
            torch._foreach_mul_(gradients, factor.pow(1 / parts).to(gradients[0].device, dtype))
    return norm


def _by_kind(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group gradients by dtype and device, so that one operation takes all of a kind."""
    kinds: dict[Hashable, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    return list(kinds.values())


@dataclass
class _ParameterGroup:
    """Parameters that are held by the same ranks in the same number of copies.

    Attributes:
        group: The ranks; None for this rank alone.
        copies: The number of copies.
        parameters: `(name, parameter)` pairs.
        totals: `[2]`: the squared norm of the gradients, and whether any rank has a gradient that must first be
            redistributed.
        elsewhere: Whether any rank has a gradient that must first be redistributed.
    """

    group: Group | None
    copies: int
    parameters: list[tuple[str, Tensor]]
    totals: Tensor
    elsewhere: bool = False

    def measure(self, misplaced: set[int], transport: Transport) -> None:
        """Compute `totals`, summed over the ranks of the group.

        All ranks of the group must call it.

        Args:
            misplaced: The ids of the parameters whose gradients must first be redistributed. These do not add to the
                norm but set the flag.
            transport: The transport that runs the all-reduce.
        """
        self.totals.zero_()
        here = [parameter for _, parameter in self.parameters if id(parameter) not in misplaced]
        if len(here) < len(self.parameters):
            self.totals[1:].fill_(1)
        for gradients in _by_kind(local(parameter.grad) for parameter in here if parameter.grad is not None):
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
            self.totals[:1] += norms.square().sum().to(self.totals.device) / self.copies
        if self.group is not None:
            transport.all_reduce(self.totals, group=self.group).wait()


def _by_ranks(named: Iterable[tuple[str, Tensor]]) -> list[_ParameterGroup]:
    """Group the parameters by ranks and copies, sorted so that all ranks run their collectives in the same order."""
    keys: dict[Hashable, tuple[Group | None, int]] = {}
    groups: dict[tuple[Group | None, int], _ParameterGroup] = {}
    for name, parameter in named:
        key = same_group(parameter)
        if key not in keys:
            layout = layout_of(parameter, name=name)
            keys[key] = layout.group, layout.num_replicas
        ranks, copies = keys[key]
        if (ranks, copies) not in groups:
            totals = torch.zeros(2, dtype=torch.float64, device=parameter.device)
            groups[ranks, copies] = _ParameterGroup(group=ranks, copies=copies, parameters=[], totals=totals)
        groups[ranks, copies].parameters.append((name, parameter))
    return sorted(groups.values(), key=lambda item: (() if item.group is None else item.group.ranks, item.copies))
