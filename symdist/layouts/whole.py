"""Layouts of weights that are whole on every rank: in a single process, or replicated by DDP."""

from torch import Tensor

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import Layout


def whole_layout(tensor: Tensor, *, replicas: Group | None = None) -> Layout:
    """Return the layout of a plain tensor.

    Args:
        tensor: The tensor.
        replicas: The ranks that hold identical copies of it. None (default) means that only this rank is known to hold
            it.

    Returns:
        A layout without splits.
    """
    shape = tuple(tensor.shape)
    if replicas is None or replicas.size == 1:
        return Layout(shape=shape)
    grid = Grid(sizes=(replicas.size,), ranks=replicas.ranks, position=replicas.index, handles=(replicas.handle,))
    return Layout(shape=shape, grid=grid)
