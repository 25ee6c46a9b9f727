"""Weights that are DTensors, as FSDP2's `fully_shard` leaves them."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from symdist.layouts.layout import Group, Layout, Split


def dtensor_layout(tensor: DTensor, *, name: str) -> Layout:
    """The layout of a DTensor that is replicated, or sharded along one mesh dimension and replicated along the rest.

    Raises ValueError, naming the parameter, for partial sums, strided shards and two sharded mesh dimensions.
    """
    sharded = [axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    strange = [tensor.placements[axis] for axis in sharded if type(tensor.placements[axis]) is not Shard]
    if strange or len(sharded) > 1:
        raise ValueError(
            f"{name}: placements {tensor.placements} are not supported; symdist takes Replicate and at most one "
            "Shard. Shard the weight along one mesh dimension (fully_shard) or keep it replicated"
        )
    shape = tuple(tensor.shape)
    if not sharded or tensor.device_mesh.size(sharded[0]) == 1:
        return Layout(shape=shape)
    axis = sharded[0]
    placement = tensor.placements[axis]
    assert isinstance(placement, Shard)
    group = _mesh_group(tensor.device_mesh, axis)
    dim = placement.dim % len(shape)
    layout = Layout(shape=shape, split=Split(dim=dim, sizes=_chunks(shape[dim], group.size), group=group))
    local = tuple(tensor.to_local().shape)
    if local != layout.local_shape:
        raise ValueError(
            f"{name}: this rank holds {local} of {shape} where an even split over {group.size} ranks gives "
            f"{layout.local_shape}; re-shard it with torch.distributed.tensor.distribute_tensor"
        )
    return layout


def _mesh_group(mesh: DeviceMesh, axis: int) -> Group:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no piece"
    line = tuple(slice(None) if i == axis else c for i, c in enumerate(coordinate))
    return Group(ranks=tuple(mesh.mesh[line].tolist()), index=coordinate[axis], handle=mesh.get_group(axis))


def _chunks(size: int, parts: int) -> tuple[int, ...]:
    """How `torch.chunk`, and so DTensor, cuts `size`: equal blocks rounded up, then what is left, then nothing."""
    block = -(-size // parts)
    return tuple(max(0, min(block, size - i * block)) for i in range(parts))
