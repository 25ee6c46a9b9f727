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
    misplaced: list[Named] = []
    for name, parameter in parameters:
        gradient = parameter.grad
        if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor) or _matches(parameter, gradient):
            continue
        layout = _layout_of_gradient(name, parameter, gradient)
        shard = gradient.to_local()
        piece = None if _is_partial(gradient) else _within(dtensor_layout(parameter, name=name), layout, shard)
        if piece is None:
            misplaced.append((name, parameter))
        else:
            parameter.grad = _placed(piece, parameter)
    return misplaced


def in_doubt(parameters: Iterable[Tensor]) -> bool:
    """Return whether another rank may have a gradient that this rank lacks, of a parameter that both hold."""
    return any(
        parameter.grad is None and parameter.device_mesh.size() > 1
        for parameter in parameters
        if isinstance(parameter, DTensor)
    )


def sum_up(parameters: Iterable[Named], *, transport: Transport, read: bool = True) -> None:
    """Redistribute gradients to the placements of their weights by communication.

    All ranks that hold any of the parameters must call it, with the same parameters in the same order. For each set of
    ranks, a small all-reduce finds the gradients that any rank holds in other placements. One more all-reduce per dtype
    sums these gradients, which temporarily takes memory for them at full size. A gradient that is missing on some ranks
    counts as zero there.

    Args:
        parameters: `(name, parameter)` pairs; plain tensors are left as they are.
        transport: The transport that runs the all-reduces.
        read: Whether the flags may be read from the device, which waits for it; True by default. If not, they are read
            only on ranks where a gradient is missing.

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
        _sum_up(by_group[group], group, transport, read)


def _sum_up(parameters: Sequence[tuple[str, DTensor]], group: Group, transport: Transport, read: bool) -> None:
    flags = [float(_is_misplaced(parameter)) for _, parameter in parameters]
    on_any_rank = torch.tensor(flags).to(parameters[0][1].device, non_blocking=True)
    transport.all_reduce(on_any_rank, group=group).wait()
    if read or in_doubt(parameter for _, parameter in parameters):
        flags = on_any_rank.tolist()
    by_dtype: dict[torch.dtype, list[tuple[str, DTensor]]] = {}
    for (name, parameter), flag in zip(parameters, flags, strict=True):
        if flag:
            by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
    for dtype, members in by_dtype.items():
        buffer = torch.cat([_contribution(name, parameter).to(dtype).reshape(-1) for name, parameter in members])
        transport.all_reduce(buffer, group=group).wait()
        for (name, parameter), total in zip(members, buffer.split([p.numel() for _, p in members]), strict=True):
            # Copy the piece, so that it does not keep the full-size buffer alive.
            piece = dtensor_layout(parameter, name=name).piece(total.view(parameter.shape)).clone()
            parameter.grad = _placed(piece, parameter)


def _matches(parameter: DTensor, gradient: DTensor) -> bool:
    """Return whether a gradient is placed like its weight."""
    return gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh


def _is_misplaced(parameter: DTensor) -> bool:
    gradient = parameter.grad
    return isinstance(gradient, DTensor) and not _matches(parameter, gradient)


def _is_partial(gradient: DTensor) -> bool:
    sizes = gradient.device_mesh.mesh.shape
    return any(isinstance(p, Partial) and size > 1 for p, size in zip(gradient.placements, sizes, strict=True))


def _layout_of_gradient(name: str, parameter: DTensor, gradient: DTensor) -> Layout:
    shape = tuple(parameter.shape)
    layout = placed_layout(gradient.device_mesh, gradient.placements, shape, name=f"the gradient of {name}", parts=True)
    weight = dtensor_layout(parameter, name=name)
    weight_ranks, gradient_ranks = (
        None if group is None else set(group.ranks) for group in (weight.group, layout.group)
    )
    if weight_ranks != gradient_ranks:
        raise ValueError(
            f"{name}: its gradient lies on ranks {sorted(gradient_ranks or ())}, the weight on ranks "
            f"{sorted(weight_ranks or ())}; redistribute the gradient to the mesh of the weight before the step"
        )
    return layout


def _within(weight: Layout, gradient: Layout, shard: Tensor) -> Tensor | None:
    """Cut the weight's local piece out of the local gradient.

    Returns:
        The piece, or None if on any rank the local gradient does not contain the rank's whole piece of the weight.
    """
    if not gradient.splits:
        return weight.piece(shard)
    if gradient.interleaved != weight.interleaved or not all(map(_covers, gradient.boxes, weight.boxes)):
        # This tests the pieces of all ranks, so that all ranks decide alike.
        return None
    return shard[
        tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(gradient.box, weight.box, strict=True))
    ]


def _covers(box: Box, inner: Box) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(box, inner, strict=True))


def _contribution(name: str, parameter: DTensor) -> Tensor:
    """Compute this rank's contribution to the sum of a gradient.

    Returns:
        The local gradient, in the full shape, divided by the number of ranks that contribute the same elements.
    """
    gradient = parameter.grad
    contribution = parameter.to_local().new_zeros(tuple(parameter.shape))
    if gradient is None:
        return contribution
    assert isinstance(gradient, DTensor)
    layout = _layout_of_gradient(name, parameter, gradient)
    if layout.interleaved:
        raise ValueError(
            f"{name}: symdist cannot redistribute its gradient, with placements {gradient.placements}, to the weight's "
            f"placements {parameter.placements}; redistribute the gradient before the step"
        )
    copies = 1
    for placement, size in zip(gradient.placements, gradient.device_mesh.mesh.shape, strict=True):
        if isinstance(placement, Partial) and placement.reduce_op not in ("sum", "avg"):
            raise ValueError(
                f"{name}: its gradient has placements {gradient.placements}; symdist supports only Partial placements "
                "with reduce_op 'sum' or 'avg'"
            )
        # Along a replicated axis, all ranks add the same elements. Along the axis of a mean, the sum must be averaged.
        averaged = isinstance(placement, Partial) and placement.reduce_op == "avg"
        copies *= size if averaged or isinstance(placement, Replicate) else 1
    contribution[tuple(slice(side.start, side.stop) for side in layout.box)] = gradient.to_local() / copies
    return contribution


def _placed(piece: Tensor, parameter: DTensor) -> DTensor:
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
        run_check=False,
    )
