"""What the dimensions of a device mesh mean for the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("dp_replicate", "dp_shard", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A device mesh, split by what its dimensions are used for. A mesh is None if there is no such dimension.

    `ep` and `tp` divide weights first; the data-parallel meshes divide what is left on each rank. Data-parallel meshes
    with replicas have two dimensions, replicas first.

    Attributes:
        weights: The data-parallel mesh of all weights that `ep` does not divide; it includes the ranks of `ep`.
        experts: The data-parallel mesh of the experts that `ep` divides.
        ep: The mesh of expert parallelism.
        tp: The mesh of tensor parallelism.
    """

    weights: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    ep: DeviceMesh | None = None
    tp: DeviceMesh | None = None


def dimensions(mesh: DeviceMesh) -> Dimensions:
    """Interpret a mesh by the names of its dimensions.

    A dimension of one rank is treated as absent, except `dp_shard`, since FSDP2 also provides mixed precision.

    Args:
        mesh: The mesh. Its dimensions are named by some of `DIMENSIONS`, in that order. A one-dimensional mesh with
            another name, or without a name, is taken as `dp_shard`.

    Returns:
        The meshes by use.

    Raises:
        ValueError: If a mesh with several dimensions has other names or none, or the order is different.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and not set(names) & set(DIMENSIONS):
        return Dimensions(weights=mesh)
    known = ", ".join(DIMENSIONS)
    if unknown := sorted(set(names) - set(DIMENSIONS)):
        raise ValueError(f"unknown mesh dimension {', '.join(unknown)}: choose the names from {known}")
    if not names:
        raise ValueError(f"the dimensions of a {mesh.ndim}-dimensional mesh need names: choose them from {known}")
    if list(names) != sorted(names, key=DIMENSIONS.index):
        raise ValueError(f"mesh dimensions {', '.join(names)} must be in this order: {known}")
    present = [name for name in names if name == "dp_shard" or mesh[name].size() > 1]
    return Dimensions(
        weights=_data_mesh(mesh, [name for name in present if name != "tp"]),
        experts=_data_mesh(mesh, [name for name in present if name.startswith("dp_")]),
        ep=mesh["ep"] if "ep" in present else None,
        tp=mesh["tp"] if "tp" in present else None,
    )


def _data_mesh(mesh: DeviceMesh, names: list[str]) -> DeviceMesh | None:
    """Return the mesh of data-parallel dimensions: replicas, if any, and all other dimensions joined into one."""
    if not names:
        return None
    if "dp_shard" not in names or "ep" not in names:
        return mesh[tuple(names)]
    shards = mesh["dp_shard", "ep"]._flatten("dp_shard_ep")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if "dp_replicate" in names else shards
