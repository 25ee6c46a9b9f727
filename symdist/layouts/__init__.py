"""Layouts: which piece of a weight this rank holds, and which ranks hold the other pieces."""

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
    """Find the layout of a parameter.

    Args:
        tensor: The parameter: a plain tensor, a DTensor, or a piece of an FSDP1 unit.
        name: The parameter's name, for error messages.
        replicas: The ranks that hold identical copies of a plain tensor. None (default) means that only this rank is
            known to hold it. Ignored for DTensors and for pieces of FSDP1 units.

    Returns:
        A `FlatLayout` for a sharded FSDP1 parameter, otherwise a `Layout`.

    Raises:
        ValueError: If symdist does not support the tensor's type or its layout.

    Example:
        >>> layout_of(torch.empty(6, 4), name="weight").local_shape
        (6, 4)
    """
    if isinstance(tensor, DTensor):
        return dtensor_layout(tensor, name=name)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, which symdist does not support; make it a plain tensor or a DTensor"
        )
    if is_flattened(tensor):
        return fsdp1_layout(tensor, name=name)
    return whole_layout(tensor, replicas=replicas)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's piece of a tensor; it shares memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_group(tensor: Tensor) -> Hashable:
    """Return a key that is equal for tensors whose pieces lie on the same ranks.

    Computing the key is cheaper than finding the layouts of the tensors. All plain tensors share the key None.

    Args:
        tensor: A plain tensor, a DTensor, or a piece of an FSDP1 unit.

    Returns:
        A hashable key.

    Raises:
        ValueError: If the tensor belongs to an FSDP1 unit whose layouts are not known.
    """
    if isinstance(tensor, DTensor):
        return id(tensor.device_mesh), tensor.placements
    layout = fsdp1_layout(tensor, name="a parameter") if is_flattened(tensor) else None
    return None if layout is None else (layout.group, type(layout))
