"""What the dimensions of a device mesh mean for a model's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("dp_replicate", "dp_shard", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A mesh by the use of its dimensions; None where it has none of that kind.

    `weights` is the mesh over which data parallelism holds every weight but the experts under `ep`, and `experts` the
    one that holds those: two-dimensional with replicas first. `ep` and `tp` split weights before that.
    """

    weights: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    ep: DeviceMesh | None = None
    tp: DeviceMesh | None = None


def dimensions(mesh: DeviceMesh) -> Dimensions:
    """Read a mesh by the names of its dimensions, some of `DIMENSIONS` in that order.

    A dimension of one rank counts as missing, except `dp_shard`, which also brings FSDP2's mixed precision. A
    one-dimensional mesh with another name, or none, is one of data-parallel shards. Raises ValueError for other names
    on a mesh of more dimensions, and for another order.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and not set(names) & set(DIMENSIONS):
        return Dimensions(weights=mesh)
    known = ", ".join(DIMENSIONS)
    if unknown := sorted(set(names) - set(DIMENSIONS)):
        raise ValueError(f"no mesh dimension is called {', '.join(unknown)}: name them by some of {known}")
    if not names:
        raise ValueError(f"the dimensions of a {mesh.ndim}-dimensional mesh need names: some of {known}")
    if list(names) != sorted(names, key=DIMENSIONS.index):
        raise ValueError(f"mesh dimensions {', '.join(names)} must stand in this order: {known}")
    present = [name for name in names if name == "dp_shard" or mesh[name].size() > 1]
    return Dimensions(
        weights=_data_mesh(mesh, [name for name in present if name != "tp"]),
        experts=_data_mesh(mesh, [name for name in present if name.startswith("dp_")]),
        ep=mesh["ep"] if "ep" in present else None,
        tp=mesh["tp"] if "tp" in present else None,
    )


def _data_mesh(mesh: DeviceMesh, names: list[str]) -> DeviceMesh | None:
    """The mesh of these data-parallel dimensions: replicas where there are any, and all the others as one."""
    if not names:
        return None
    if "dp_shard" not in names or "ep" not in names:
        return mesh[tuple(names)]
    shards = mesh["dp_shard", "ep"]._flatten("dp_shard_ep")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if "dp_replicate" in names else shards
