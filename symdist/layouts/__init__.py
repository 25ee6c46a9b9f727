"""Layouts: what piece of a weight this rank holds, and who holds the others."""

from collections.abc import Hashable

from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.layouts.dtensor import dtensor_layout, peers
from symdist.layouts.flat import FlatLayout
from symdist.layouts.fsdp1 import fsdp1_layout, is_flattened
from symdist.layouts.grid import Grid, Group
from symdist.layouts.groups import ascending, group_from
from symdist.layouts.layout import Box, DimSplit, Layout, cut_along, numel
from symdist.layouts.whole import whole_layout

__all__ = [
    "Box",
    "DimSplit",
    "FlatLayout",
    "Grid",
    "Group",
    "Layout",
    "ascending",
    "cut_along",
    "group_from",
    "layout_of",
    "local",
    "numel",
    "peers",
    "same_group",
]


def layout_of(tensor: Tensor, *, name: str, replicas: Group | None = None) -> Layout | FlatLayout:
    """The layout of a parameter; `replicas` are the ranks that hold plain tensors alike, where that is known.

    Raises ValueError, naming the parameter, where no layout fits.
    """
    if isinstance(tensor, DTensor):
        return dtensor_layout(tensor, name=name)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(f"{name} is a {type(tensor).__name__}; symdist takes plain tensors and DTensors")
    if is_flattened(tensor):
        return fsdp1_layout(tensor, name=name)
    return whole_layout(tensor, replicas=replicas)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_group(tensor: Tensor) -> Hashable:
    """A key that tensors share whose pieces lie on the same ranks: cheaper to have than their layouts."""
    if isinstance(tensor, DTensor):
        return id(tensor.device_mesh), tensor.placements
    layout = fsdp1_layout(tensor, name="a parameter") if is_flattened(tensor) else None
    return None if layout is None else (layout.group, type(layout))
