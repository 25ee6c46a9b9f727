"""Layouts: what piece of a weight this rank holds, and who holds the others."""

from collections.abc import Hashable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from symdist.layouts.dtensor import dtensor_layout, mesh_group, peers
from symdist.layouts.flat import FlatLayout
from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import Box, Layout, Split, cut_along, numel
from symdist.layouts.whole import whole_layout

__all__ = [
    "Box",
    "FlatLayout",
    "Grid",
    "Group",
    "Layout",
    "Split",
    "ascending",
    "check_placements",
    "cut_along",
    "group_from",
    "layout_of",
    "local",
    "numel",
    "peers",
    "same_group",
]


def layout_of(tensor: Tensor, *, name: str, replicas: Group | None = None) -> Layout:
    """The layout of a parameter; `replicas` are the ranks that hold plain tensors alike, where that is known.

    Raises ValueError, naming the parameter, where no layout fits.
    """
    if isinstance(tensor, DTensor):
        return dtensor_layout(tensor, name=name)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(f"{name} is a {type(tensor).__name__}; symdist takes plain tensors and DTensors")
    return whole_layout(tensor, replicas=replicas)


def group_from(ranks: Any) -> Group:
    """The group of a `ProcessGroup` or of all ranks of a `DeviceMesh`; TypeError for anything else."""
    if isinstance(ranks, DeviceMesh):
        return mesh_group(ranks)
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(f"{ranks!r} is neither a ProcessGroup nor a DeviceMesh")
    members = tuple(sorted(dist.get_process_group_ranks(ranks)))
    return Group(ranks=members, index=members.index(dist.get_rank()), handle=ranks, through=(ranks,))


def ascending(group: Any) -> Group:
    """The group of a `ProcessGroup`; ValueError where it does not number its ranks in ascending order."""
    found = group_from(group)
    if dist.get_process_group_ranks(group) != list(found.ranks):
        raise ValueError(f"process group of ranks {dist.get_process_group_ranks(group)}: they must ascend")
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_group(tensor: Tensor) -> Hashable:
    """A key that tensors share whose pieces lie on the same ranks: cheaper to have than their layouts."""
    return (id(tensor.device_mesh), tensor.placements) if isinstance(tensor, DTensor) else None


def check_placements(name: str, tensor: Tensor, gradient: Tensor) -> None:
    """ValueError, naming the parameter, for a gradient that is placed otherwise than its weight."""
    mine = getattr(tensor, "placements", None)
    theirs = getattr(gradient, "placements", None)
    if mine != theirs:
        raise ValueError(
            f"{name}: its gradient is placed {theirs}, the weight {mine}; redistribute the gradient to the placements "
            "of the weight before the step"
        )
