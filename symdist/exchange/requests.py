"""What a placement, as opposed to a rule, asks of the ranks: to put matrices together, and to take them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.exchange.routes import Route


@dataclass(frozen=True, eq=False, kw_only=True)
class Ship:
    """Send this rank's pieces along `route`, as `dtype`; answered with the `[owned, p, q]` units this rank owns.

    A layer is one tensor of each parameter; all layers travel together and are answered one by one.
    """

    layers: Sequence[Sequence[Tensor]]
    route: Route
    dtype: torch.dtype


@dataclass(frozen=True, eq=False, kw_only=True)
class Return:
    """Send the `[owned, p, q]` layers made here back, as `dtype`; answered with this rank's pieces, layer by layer."""

    layers: Sequence[Tensor]
    route: Route
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of this rank's piece."""
