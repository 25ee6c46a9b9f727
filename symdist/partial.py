"""Gradients that are still sums in parts: those of weights that tensor parallelism leaves whole on every rank."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from symdist.exchange import Transport
from symdist.layouts import Group, layout_of


def finish_partial_gradients(parameters: Iterable[Tensor], *, transport: Transport) -> None:
    """Sum up, in place of each `grad`, gradients that are DTensors with `Partial` placements of weights that are whole.

    One small all-reduce says which gradients any rank has in parts, one more sums them all up; neither runs where no
    DTensor is whole on several ranks. A gradient missing on some ranks counts as zero there. Other placements are left
    as they are. Raises ValueError for a `Partial` that is neither a sum nor a mean.
    """
    for group, whole in whole_on_several_ranks(parameters):
        _finish(whole, group, transport)


def whole_on_several_ranks(parameters: Iterable[Tensor]) -> list[tuple[Group, list[DTensor]]]:
    """The parameters whose gradients may be in parts, by the ranks that hold them, in the order of their exchange."""
    by_group: dict[Group, list[DTensor]] = {}
    known: dict[int, Group | None] = {}
    for parameter in parameters:
        # Only these: what fully_shard holds is sharded, and reduced by it.
        if isinstance(parameter, DTensor) and all(isinstance(p, Replicate) for p in parameter.placements):
            mesh = parameter.device_mesh
            if id(mesh) not in known:
                known[id(mesh)] = layout_of(parameter, name="a replicated weight").group
            group = known[id(mesh)]
            if group is not None:
                by_group.setdefault(group, []).append(parameter)
    return [(group, by_group[group]) for group in sorted(by_group, key=lambda group: group.ranks)]


def _finish(parameters: Sequence[DTensor], group: Group, transport: Transport) -> None:
    flags = [float(_is_partial(parameter)) for parameter in parameters]
    anywhere = torch.tensor(flags, device=parameters[0].device)
    transport.all_reduce(anywhere, group=group).wait()
    found = [parameter for parameter, flag in zip(parameters, anywhere.tolist(), strict=True) if flag]
    by_dtype: dict[torch.dtype, list[DTensor]] = {}
    for parameter in found:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for dtype, alike in by_dtype.items():
        # Each rank's share of the sum; the axes that it is not partial over hold the same, so take it once.
        buffer = torch.cat([_share(parameter).to(dtype).reshape(-1) for parameter in alike])
        transport.all_reduce(buffer, group=group).wait()
        for parameter, total in zip(alike, buffer.split([parameter.numel() for parameter in alike]), strict=True):
            parameter.grad = DTensor.from_local(
                total.view(parameter.shape), parameter.device_mesh, parameter.placements, run_check=False
            )


def _is_partial(parameter: DTensor) -> bool:
    gradient = parameter.grad
    return isinstance(gradient, DTensor) and any(isinstance(p, Partial) for p in gradient.placements)


def _share(parameter: DTensor) -> Tensor:
    """What this rank adds to the sum over all ranks of the mesh."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter.to_local())
    assert isinstance(gradient, DTensor)
    share = gradient.to_local()
    for axis, placement in enumerate(gradient.placements):
        if isinstance(placement, Partial) and placement.reduce_op not in ("sum", "avg"):
            raise ValueError(f"a gradient is placed {gradient.placements}; only sums and means can be added up")
        if not isinstance(placement, Partial) or placement.reduce_op == "avg":
            share = share / gradient.device_mesh.size(axis)
    return share
