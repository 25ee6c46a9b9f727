"""Weights that are whole on every rank: a single process, or replicas under DDP."""

from torch import Tensor

from symdist.layouts.layout import Layout


def whole_layout(tensor: Tensor) -> Layout:
    """The layout of a plain tensor."""
    return Layout(shape=tuple(tensor.shape))
