"""Redistribution of gradients whose DTensor placements differ from their weights', as under tensor parallelism."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from symdist.exchange import Transport
from symdist.layouts import Box, Group, Layout
from symdist.layouts.dtensor import dtensor_layout, placed_layout

Named = tuple[str, Tensor]


def bring_home(parameters: Iterable[Named]) -> list[Named]:
    """Redistribute gradients to the placements of their weights where that needs no communication.

    No communication is needed if every rank's gradient contains the rank's whole piece of the weight, for example if
    the gradient is replicated and the weight sharded. Such gradients are replaced in the parameters' `grad`.

    Args:
        parameters: `(name, parameter)` pairs. Plain tensors, and gradients placed like their weights, are left as they
            are.

    Returns:
        The pairs whose gradients need communication (`Partial`, or elements held by other ranks), for `sum_up`.

    Raises:
        ValueError: Naming the parameter, if its gradient lies on another set of ranks or its placements are not
            supported.
    """
    elsewhere: list[Named] = []
    for name, parameter in parameters:
        gradient = parameter.grad
        if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor) or _as_weight(parameter, gradient):
            continue
        found = _layout_of_gradient(name, parameter, gradient)
        here = gradient.to_local()
        piece = None if _parts(gradient) else _within(dtensor_layout(parameter, name=name), found, here)
        if piece is None:
            elsewhere.append((name, parameter))
        else:
            parameter.grad = _placed(piece, parameter)
    return elsewhere


def sum_up(parameters: Iterable[Named], *, transport: Transport) -> None:
    """Redistribute gradients to the placements of their weights by communication.

    All ranks that hold any of the parameters must call it, with the same parameters in the same order. For each set of
    ranks, a small all-reduce finds the gradients that any rank holds in other placements. One more all-reduce per dtype
    sums these gradients, which temporarily takes memory for them at full size. A gradient that is missing on some ranks
    counts as zero there.

    Args:
        parameters: `(name, parameter)` pairs; plain tensors are left as they are.
        transport: The transport that runs the all-reduces.

    Raises:
        ValueError: Naming the parameter, if its gradient cannot be summed: it has a `Partial` placement that is neither
            a sum nor a mean, its layout is interleaved or not supported, or it lies on another set of ranks.
    """
    by_group: dict[Group, list[tuple[str, DTensor]]] = {}
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        group = dtensor_layout(parameter, name=name).group
        if group is not None:
            by_group.setdefault(group, []).append((name, parameter))
    for group in sorted(by_group, key=lambda group: group.ranks):
        _sum_up(by_group[group], group, transport)


def _sum_up(parameters: Sequence[tuple[str, DTensor]], group: Group, transport: Transport) -> None:
    flags = [float(_elsewhere(parameter)) for _, parameter in parameters]
    anywhere = torch.tensor(flags, device=parameters[0][1].device)
    transport.all_reduce(anywhere, group=group).wait()
    by_dtype: dict[torch.dtype, list[tuple[str, DTensor]]] = {}
    for (name, parameter), flag in zip(parameters, anywhere.tolist(), strict=True):
        if flag:
            by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
    for dtype, alike in by_dtype.items():
        buffer = torch.cat([_share(name, parameter).to(dtype).reshape(-1) for name, parameter in alike])
        transport.all_reduce(buffer, group=group).wait()
        for (name, parameter), total in zip(alike, buffer.split([p.numel() for _, p in alike]), strict=True):
            # Copy the piece, so that it does not keep the full-size buffer alive.
            piece = dtensor_layout(parameter, name=name).piece(total.view(parameter.shape)).clone()
            parameter.grad = _placed(piece, parameter)


def _as_weight(parameter: DTensor, gradient: DTensor) -> bool:
    return gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh


def _elsewhere(parameter: DTensor) -> bool:
    gradient = parameter.grad
    return isinstance(gradient, DTensor) and not _as_weight(parameter, gradient)


def _parts(gradient: DTensor) -> bool:
    sizes = gradient.device_mesh.mesh.shape
    return any(isinstance(p, Partial) and size > 1 for p, size in zip(gradient.placements, sizes, strict=True))


def _layout_of_gradient(name: str, parameter: DTensor, gradient: DTensor) -> Layout:
    shape = tuple(parameter.shape)
    found = placed_layout(gradient.device_mesh, gradient.placements, shape, name=f"the gradient of {name}", parts=True)
    weight = dtensor_layout(parameter, name=name)
    mine, theirs = (None if group is None else set(group.ranks) for group in (weight.group, found.group))
    if mine != theirs:
        raise ValueError(
            f"{name}: its gradient lies on ranks {sorted(theirs or ())}, the weight on {sorted(mine or ())}; "
            "redistribute the gradient to the mesh of the weight before the step"
        )
    return found


def _within(weight: Layout, found: Layout, here: Tensor) -> Tensor | None:
    """Cut the weight's local piece out of the local gradient.

    Returns:
        The piece, or None if on any rank the local gradient does not contain the rank's whole piece of the weight.
    """
    if not found.splits:
        return weight.piece(here)
    if found.interleaved != weight.interleaved or not all(map(_covers, found.boxes, weight.boxes)):
        # This tests the pieces of all ranks, so that all ranks decide alike.
        return None
    return here[tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(found.box, weight.box, strict=True))]


def _covers(box: Box, wanted: Box) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(box, wanted, strict=True))


def _share(name: str, parameter: DTensor) -> Tensor:
    """Compute this rank's contribution to the sum of a gradient.

    Returns:
        The local gradient, in the full shape, divided by the number of ranks that contribute the same elements.
    """
    gradient = parameter.grad
    share = parameter.to_local().new_zeros(tuple(parameter.shape))
    if gradient is None:
        return share
    assert isinstance(gradient, DTensor)
    found = _layout_of_gradient(name, parameter, gradient)
    if found.interleaved:
        raise ValueError(
            f"{name}: its gradient is placed {gradient.placements}, the weight {parameter.placements}; redistribute "
            "the gradient to the placements of the weight before the step"
        )
    copies = 1
    for placement, size in zip(gradient.placements, gradient.device_mesh.mesh.shape, strict=True):
        if isinstance(placement, Partial) and placement.reduce_op not in ("sum", "avg"):
            raise ValueError(
                f"{name}: its gradient is placed {gradient.placements}; only sums and means can be added up"
            )
        # Along a replicated axis, all ranks add the same elements. Along the axis of a mean, the sum must be averaged.
        averaged = isinstance(placement, Partial) and placement.reduce_op == "avg"
        copies *= size if averaged or isinstance(placement, Replicate) else 1
    share[tuple(slice(side.start, side.stop) for side in found.box)] = gradient.to_local() / copies
    return share


def _placed(piece: Tensor, parameter: DTensor) -> DTensor:
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
        run_check=False,
    )
