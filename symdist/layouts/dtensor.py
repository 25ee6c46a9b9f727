"""Layouts of DTensors, as FSDP2 (`fully_shard`), tensor parallelism, expert parallelism and their combinations make."""

import functools
from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import DimSplit, Interleaving, Layout


def dtensor_layout(tensor: DTensor, *, name: str) -> Layout:
    """Find the layout of a DTensor, see `placed_layout`.

    Args:
        tensor: The DTensor; this rank must be in its mesh.
        name: The parameter's name, for error messages.

    Returns:
        The layout, without mesh axes of size one.

    Raises:
        ValueError: In the cases where `placed_layout` raises, or if this rank's piece does not have the shape that the
            placements imply.
    """
    layout = placed_layout(tensor.device_mesh, tensor.placements, tuple(tensor.shape), name=name)
    local = tuple(tensor.to_local().shape)
    if local != layout.local_shape:
        raise ValueError(
            f"{name}: this rank's piece of the tensor {layout.shape} has shape {local}, but by the placements "
            f"{tensor.placements} it must be {layout.local_shape}; re-shard it with "
            "torch.distributed.tensor.distribute_tensor"
        )
    return layout


def placed_layout(
    mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...], *, name: str, parts: bool = False
) -> Layout:
    """Find the layout of a tensor from its device mesh and placements.

    If several mesh axes shard the same dimension, the placements decide in which order they cut it. A strided shard is
    applied after all axes to its right that shard the same dimension. FSDP2 combined with tensor parallelism cuts in
    this way, even where sizes are so uneven (17 rows over 4 × 2 ranks) that DTensor itself reads its placements
    differently.

    A strided shard with no such axis to its right instead divides the dimension into equal stretches and gives every
    rank a share of each stretch, as tensor parallelism does with a fused gate and up.

    Args:
        mesh: The device mesh; this rank must be in it.
        placements: One placement per mesh axis: Replicate, Shard or a strided shard.
        shape: The whole tensor's shape.
        name: The parameter's name, for error messages.
        parts: Whether `Partial` placements (partial sums) are accepted too. Each partial sum is treated as a piece that
            is not cut along that axis. False by default.

    Returns:
        The layout, without mesh axes of size one.

    Raises:
        ValueError: If a placement is not supported, or the stretches of a strided shard do not divide evenly. All ranks
            of the mesh raise alike.
    """
    supported = (Replicate, Shard, _StridedShard, *((Partial,) if parts else ()))
    unsupported = [placement for placement in placements if type(placement) not in supported]
    if unsupported:
        raise ValueError(
            f"{name}: placements {tuple(placements)} contain {unsupported[0]}, which symdist does not support; "
            "redistribute the tensor to Replicate, Shard or strided shards"
        )
    sizes = tuple(mesh.mesh.shape)
    # An axis of size one has no effect. Without it, layouts that mean the same compare equal.
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
    """Return all ranks that train the model together.

    These are the ranks of the root mesh, from which the tensor's mesh was sliced.

    Args:
        tensor: The DTensor; this rank must be in its mesh.

    Returns:
        The group of all ranks of the root mesh.
    """
    mesh = tensor.device_mesh._get_root_mesh()
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def mesh_group(mesh: DeviceMesh) -> Group:
    """Return the group of all ranks of a mesh."""
    return _grid(mesh, list(range(mesh.ndim))).group(range(mesh.ndim))


def _grid(mesh: DeviceMesh, axes: list[int]) -> Grid:
    """Arrange the ranks of a mesh as a grid of the given axes, which are all axes of more than one rank."""
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
    """Return the mesh axes that cut a dimension, in the order in which they cut it."""
    order: list[int] = []
    right = 1  # The number of pieces that the axes to the right make.
    for axis in reversed(cutting):
        factor = _split_factor(placements[axis])
        if order and factor not in (1, right):
            raise ValueError(
                f"{name}: placements {tuple(placements)} are not supported: {placements[axis]} has split_factor "
                f"{factor}, but the mesh axes to its right cut the dimension into {right} pieces; the two must be equal"
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
            f"{name}: dimension {dim}, of size {size}, does not divide evenly into {placement.split_factor} parts for "
            f"{ranks} ranks, as {placement} requires; choose another tensor parallel size"
        )
    return Interleaving(dim=dim, parts=placement.split_factor, ranks=ranks)


@functools.lru_cache(maxsize=4096)
def _ranges(size: int, counts: tuple[int, ...], order: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Compute the blocks of a dimension that is cut over several axes.

    Args:
        size: The size of the dimension.
        counts: The number of ranks along each axis.
        order: The axes in the order in which they cut the dimension.

    Returns:
        The block `(start, stop)` at every coordinate of the axes, in row-major order.
    """
    blocks: dict[tuple[int, ...], tuple[int, int]] = {(): (0, size)}
    for axis in order:
        blocks = {
            (*coordinate, i): chunk
            for coordinate, (start, stop) in blocks.items()
            for i, chunk in enumerate(_chunks(start, stop, counts[axis]))
        }
    # So far the coordinates are in the order of cutting. Bring them into the order of the axes.
    inverse = [order.index(axis) for axis in range(len(order))]
    by_axes = ((tuple(coordinate[i] for i in inverse), block) for coordinate, block in blocks.items())
    return tuple(block for _, block in sorted(by_axes))


def _chunks(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cut a range as `torch.chunk` and DTensor do.

    The block size is the length divided by `parts`, rounded up. The first blocks have this size; then comes at most one
    smaller block, and any others are empty.
    """
    block = -(-(stop - start) // parts)
    return [(min(start + i * block, stop), min(start + (i + 1) * block, stop)) for i in range(parts)]
