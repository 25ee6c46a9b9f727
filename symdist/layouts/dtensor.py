"""Layouts of DTensors, as made by FSDP2's `fully_shard`, tensor and expert parallelism, and combinations of them."""

import functools
from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import DimSplit, Interleaving, Layout


def dtensor_layout(tensor: DTensor, *, name: str) -> Layout:
    """Find the layout of a DTensor; see `placed_layout`.

    Raises:
        ValueError: As `placed_layout` does, or if this rank's piece has another shape than the placements give.
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
    """Find the layout of a tensor from its device mesh and placements.

    A dimension sharded over several mesh axes is cut in the order that the placements give: a strided shard comes after
    all axes to its right that shard the same dimension. FSDP2 over tensor parallelism cuts this way, even for sizes so
    uneven (17 rows over 4 × 2) that DTensor's own reading of its placements differs. A strided shard without such an
    axis deals out equal stretches of the dimension, as tensor parallelism does with a fused gate and up.

    Args:
        mesh: The device mesh; this rank must be in it.
        placements: One for each mesh axis: Replicate, Shard or a strided shard.
        shape: The whole tensor's shape.
        name: The parameter's name, for error messages.
        parts: Whether to accept partial sums too, as pieces that span the whole along their axis; False by default.

    Returns:
        The layout, without mesh axes of size one.

    Raises:
        ValueError: For other placements, or stretches that do not divide evenly; on all ranks alike.
    """
    known = (Replicate, Shard, _StridedShard, *((Partial,) if parts else ()))
    strange = [placement for placement in placements if type(placement) not in known]
    if strange:
        raise ValueError(
            f"{name}: placements {tuple(placements)} are not supported, because of {strange[0]}; symdist takes "
            "Replicate, Shard and strided shards"
        )
    sizes = tuple(mesh.mesh.shape)
    # An axis of one rank changes nothing; without it, layouts that mean the same compare equal.
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
    """Return all ranks of the mesh that the tensor's mesh was sliced from: those that train the model together."""
    mesh = tensor.device_mesh._get_root_mesh()
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def mesh_group(mesh: DeviceMesh) -> Group:
    """Return all ranks of a mesh."""
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def _grid(mesh: DeviceMesh, axes: list[int]) -> Grid:
    """The mesh reduced to `axes`: those of more than one rank."""
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
    """The mesh axes that cut a dimension, in the order in which they cut it."""
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
    """The block at every coordinate of an array of `counts` ranks, in row-major order, cut by its axes in `order`."""
    blocks: dict[tuple[int, ...], tuple[int, int]] = {(): (0, size)}
    for axis in order:
        blocks = {
            (*at, i): chunk
            for at, (start, stop) in blocks.items()
            for i, chunk in enumerate(_chunks(start, stop, counts[axis]))
        }
    # Coordinates are in the order of cutting; put them into the order of the axes.
    inverse = [order.index(axis) for axis in range(len(order))]
    return tuple(block for _, block in sorted((tuple(at[i] for i in inverse), block) for at, block in blocks.items()))


def _chunks(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cut as `torch.chunk` and DTensor do: blocks of the size rounded up, then a smaller one, then empty ones."""
    block = -(-(stop - start) // parts)
    return [(min(start + i * block, stop), min(start + (i + 1) * block, stop)) for i in range(parts)]
