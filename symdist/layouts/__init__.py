"""Layouts: what piece of a weight this rank holds, and who holds the others."""

from collections.abc import Hashable

from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.layouts.dtensor import dtensor_layout
from symdist.layouts.layout import Group, Layout, Split
from symdist.layouts.whole import whole_layout

__all__ = ["Group", "Layout", "Split", "check_placements", "layout_of", "local", "same_group"]


def layout_of(tensor: Tensor, *, name: str) -> Layout:
    """The layout of a parameter; ValueError, naming it, where no layout fits."""
    if isinstance(tensor, DTensor):
        return dtensor_layout(tensor, name=name)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(f"{name} is a {type(tensor).__name__}; symdist takes plain tensors and DTensors")
    return whole_layout(tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_group(tensor: Tensor) -> Hashable:
    """A key that tensors share whose pieces lie on the same ranks: cheaper to have than their layouts."""
    return (id(tensor.device_mesh), tensor.placements) if isinstance(tensor, DTensor) else None


def check_placements(name: str, tensor: Tensor, gradient: Tensor) -> None:
    """ValueError, naming the parameter, for a gradient that is placed otherwise than its weight: a partial sum, say."""
    mine = getattr(tensor, "placements", None)
    theirs = getattr(gradient, "placements", None)
    if mine != theirs:
        raise ValueError(
            f"{name}: its gradient is placed {theirs}, the weight {mine}; reduce or redistribute gradients first "
            "(tensor parallelism is not supported yet)"
        )
