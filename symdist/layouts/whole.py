"""Weights that are whole on every rank: a single process, or replicas under DDP."""

from torch import Tensor

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import Layout


def whole_layout(tensor: Tensor, *, replicas: Group | None = None) -> Layout:
    """The layout of a plain tensor; `replicas` are the ranks that hold the same one, where that is known."""
    shape = tuple(tensor.shape)
    if replicas is None or replicas.size == 1:
        return Layout(shape=shape)
    grid = Grid(sizes=(replicas.size,), ranks=replicas.ranks, position=replicas.index, handles=(replicas.handle,))
    return Layout(shape=shape, grid=grid)
