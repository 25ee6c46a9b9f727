"""Requests of the owner and reduce strategies: put matrices together at owners (Gather), send updates back (Scatter).

Unlike sums and roots, these come from a job, not from its rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Redistribution(Protocol):
    """Which parts of pieces go to which rank for matrices to be put together, and how updates come back.

    It is worked out alike on all ranks, so sender and receiver agree on the order. Parts that a rank keeps are not
    sent: what `kept` returns is handed to `wholes` as it is, and what `kept_home` returns to `home`. Ranks are group
    indices.
    """

    def kept(self, pieces: Sequence[Tensor]) -> Any:
        """Return what this rank keeps of its pieces."""

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return what this rank sends of its pieces, by rank."""

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives, by rank."""

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Any) -> Tensor:
        """Put together what this rank updates.

        Args:
            received: What came from each rank, flat.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept` returned.
        """

    def kept_home(self, made: Tensor) -> Any:
        """Return what this rank keeps of the updates it made."""

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """Return what this rank sends of the updates it made, by rank; `made` is shaped like the result of `wholes`."""

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates this rank receives, by rank."""

    def home(self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: Any) -> list[Tensor]:
        """Put together this rank's piece of every matrix's update.

        Args:
            received: What came from each rank, flat.
            shape: The shape of a piece.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept_home` returned.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather:
    """Request to send this rank's pieces to owners; answered with what this rank puts together, one tensor per field.

    Attributes:
        fields: Lists with one tensor per parameter: the direction, the mask, what the rule remembers. All fields
            travel together.
        route: Who sends what to whom.
        dtype: The dtype in which they are sent.
        like: An empty tensor with the dtype and device of the answer.
    """

    fields: Sequence[Sequence[Tensor]]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Scatter:
    """Request to send updates back from owners; answered with a list of this rank's pieces per field.

    Attributes:
        fields: What was made here, shaped like the answer to the Gather.
        route: The route of the Gather, taken backwards.
        dtype: The dtype in which they are sent.
        like: An empty tensor with the dtype and device of the answer.
        shape: The shape of this rank's piece.
    """

    fields: Sequence[Tensor]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor
    shape: tuple[int, ...]
