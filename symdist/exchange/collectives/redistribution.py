"""What a strategy, as opposed to a rule, asks of the ranks: to put matrices together, and to take them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Redistribution(Protocol):
    """How pieces travel to where matrices are put together, and updates back: by rank, in one order on both ends.

    What is kept never travels; the exchange only hands it from one end of the way to the other.
    """

    def kept(self, pieces: Sequence[Tensor]) -> Any:
        """What stays here, of this rank's pieces."""

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """What goes to each rank, of this rank's pieces."""

    def received_pieces(self) -> dict[int, int]:
        """How many numbers come from each rank."""

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Any) -> Tensor:
        """What this rank puts together, of the dtype of `like`."""

    def kept_home(self, made: Tensor) -> Any:
        """What stays here, of the updates made here."""

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """What goes back to each rank, of the updates made here."""

    def received_home(self) -> dict[int, int]:
        """How many numbers come back from each rank."""

    def home(self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: Any) -> list[Tensor]:
        """This rank's piece of every matrix."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather:
    """Send this rank's pieces along `route`, as `dtype`; answered with what is put together here.

    A field is one tensor of each parameter; all fields travel together and are answered one by one, in the dtype and
    on the device of `like`, an empty tensor.
    """

    fields: Sequence[Sequence[Tensor]]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Scatter:
    """Send the fields made here back, as `dtype`; answered with this rank's pieces, field by field, like `like`."""

    fields: Sequence[Tensor]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor
    shape: tuple[int, ...]
    """Of this rank's piece."""
