"""Weights that are DTensors: as FSDP2's `fully_shard`, tensor and expert parallelism and their products leave them."""

import functools
from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import DimSplit, Interleaving, Layout


def dtensor_layout(tensor: DTensor, *, name: str) -> Layout:
    """The layout of a DTensor, as `placed_layout` reads it.

    Raises ValueError, naming the parameter, as that does, and for pieces that are not where the placements say.
    """
    layout = placed_layout(tensor.device_mesh, tensor.placements, tuple(tensor.shape), name=name)
    local = tuple(tensor.to_local().shape)
    if local != layout.local_shape:
        raise ValueError(
            f"{name}: this rank holds {local} of {layout.shape} where placements {tensor.placements} give "
            f"{layout.local_shape}; re-shard it with torch.distributed.tensor.distribute_tensor"
        )
    return layout


def placed_layout(
    mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...], *, name: str, parts: bool = False
) -> Layout:
    """The layout of a tensor that every mesh axis replicates or shards, plainly or strided.

    A dimension sharded over several axes is cut in the order that the placements tell: a strided shard comes after all
    axes to its right that shard the same dimension. That is how FSDP2 over tensor parallelism cuts, also where sizes
    are so uneven (17 rows over 4 × 2) that DTensor's own reading of its placements is another. A strided shard with
    none to its right deals out equal stretches of the dimension, as tensor parallelism does with a fused gate and up.
    With `parts` partial sums are let pass, as what every rank of their axis has of the whole.

    Raises ValueError, naming the parameter, for other placements, and stretches that do not divide: alike on all ranks.
    """
    known = (Replicate, Shard, _StridedShard, *((Partial,) if parts else ()))
    strange = [placement for placement in placements if type(placement) not in known]
    if strange:
        raise ValueError(
            f"{name}: placements {tuple(placements)} are not supported, because of {strange[0]}; symdist takes "
            "Replicate, Shard and strided shards"
        )
    sizes = tuple(mesh.mesh.shape)
    # An axis of one rank changes nothing, and left out makes equal what is equal.
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    if not axes:
        return Layout(shape=shape)
    splits, interleaved = [], []
    by_dim: dict[int, list[int]] = {}
    for axis in axes:
        placement = placements[axis]
        if isinstance(placement, Shard | _StridedShard):
            by_dim.setdefault(placement.dim % len(shape), []).append(axis)
    for dim, cutting in sorted(by_dim.items()):
        order = _order_of_cuts(placements, cutting, sizes, name=name)
        last = cutting[-1]
        if _split_factor(placements[last]) != 1:
            interleaved.append(_interleaving(dim, shape[dim], placements[last], sizes[last], name=name))
        ranges = _ranges(shape[dim], tuple(sizes[axis] for axis in cutting), tuple(map(cutting.index, order)))
        splits.append(DimSplit(dim=dim, axes=tuple(axes.index(axis) for axis in cutting), ranges=ranges))
    return Layout(shape=shape, grid=_grid(mesh, axes), splits=tuple(splits), interleaved=tuple(interleaved))


def peers(tensor: DTensor) -> Group:
    """All ranks of the mesh that the tensor's mesh was sliced from: those that train the model together."""
    mesh = tensor.device_mesh._get_root_mesh()
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def mesh_group(mesh: DeviceMesh) -> Group:
    """All ranks of a mesh."""
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def _grid(mesh: DeviceMesh, axes: list[int]) -> Grid:
    """The mesh without its axes of size one."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no piece"
    sizes = tuple(mesh.size(axis) for axis in axes)
    position = 0
    for axis, size in zip(axes, sizes, strict=True):
        position = position * size + coordinate[axis]
    handles = tuple(mesh.get_group(axis) for axis in axes)
    return Grid(sizes=sizes, ranks=tuple(mesh.mesh.flatten().tolist()), position=position, handles=handles)


def _order_of_cuts(
    placements: Sequence[Placement], cutting: list[int], sizes: tuple[int, ...], *, name: str
) -> list[int]:
    """The mesh axes that cut a dimension, in the order of cutting."""
    order: list[int] = []
    right = 1
    for axis in reversed(cutting):
        factor = _split_factor(placements[axis])
        if order and factor not in (1, right):
            raise ValueError(
                f"{name}: placements {tuple(placements)} are not supported: {placements[axis]} is strided by "
                f"{factor} where the axes to its right make {right} pieces"
            )
        if order and factor != 1:
            order.append(axis)
        else:
            order.insert(0, axis)
        right *= sizes[axis]
    return order


def _split_factor(placement: Placement) -> int:
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


def _interleaving(dim: int, size: int, placement: Any, ranks: int, *, name: str) -> Interleaving:
    if size % (placement.split_factor * ranks):
        raise ValueError(
            f"{name}: {size} of dimension {dim} do not divide into {placement.split_factor} parts for {ranks} ranks, "
            f"as {placement} wants; choose a tensor parallel size that divides them"
        )
    return Interleaving(dim=dim, parts=placement.split_factor, ranks=ranks)


@functools.lru_cache(maxsize=4096)
def _ranges(size: int, counts: tuple[int, ...], order: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The block of every coordinate of an array of `counts` ranks, row-major, cut by its axes in `order`."""
    blocks: dict[tuple[int, ...], tuple[int, int]] = {(): (0, size)}
    for axis in order:
        blocks = {
            (*at, i): chunk
            for at, (start, stop) in blocks.items()
            for i, chunk in enumerate(_chunks(start, stop, counts[axis]))
        }
    # From coordinates in the order of cutting to those in the order of the axes.
    inverse = [order.index(axis) for axis in range(len(order))]
    return tuple(block for _, block in sorted((tuple(at[i] for i in inverse), block) for at, block in blocks.items()))


def _chunks(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """How `torch.chunk`, and so DTensor, cuts: equal blocks rounded up, then what is left, then nothing."""
    block = -(-(stop - start) // parts)
    return [(min(start + i * block, stop), min(start + (i + 1) * block, stop)) for i in range(parts)]
