"""Requests that move matrices between ranks: Gather puts them together at owners, Scatter sends updates back.

They are used by the strategies "owner" and "reduce". Unlike sums and roots, these requests come from a job and not from
its rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pieces of one shape that a rank updates together.

    Attributes:
        members: For each piece, the position of its parameter in the job's `members`.
        box: The range of the matrix that the pieces cover, along each stored dimension.
    """

    members: Sequence[int]
    box: Sequence[range]


class Redistribution(Protocol):
    """How matrices get from where they are stored to where their rule runs, and their updates back.

    It says which parts of its pieces each rank sends to which rank. All ranks compute it alike, so sender and receiver
    agree on the order of the data. The methods do not communicate. Parts that stay on a rank need not be sent: `kept`
    returns these and `wholes` takes them; for updates, `kept_home` returns them and `home` takes them. Ranks are given
    by group index.

    Attributes:
        gathers: Whether any rank sends anything on the way there. If not, `wholes` is called with nothing received.
        scatters: Whether any rank sends anything on the way back. If not, `home` is called with nothing received.
        batches: What this rank updates; pieces of different shapes are in different batches.
    """

    gathers: bool
    scatters: bool
    batches: Sequence[Batch]

    def stacked(self, assembled: Tensor, batch: int) -> Tensor:
        """Return the pieces of a batch.

        Args:
            assembled: The result of `wholes`.
            batch: The batch's index in `batches`.

        Returns:
            `[k, *shape]`: the k pieces, each in the shape of the batch's box.
        """

    def unstacked(self, updates: Sequence[Tensor], *, like: Tensor) -> Tensor:
        """Undo `stacked`.

        Args:
            updates: For each of `batches`, the updates of its pieces, stacked; empty where this rank updates nothing.
            like: An empty tensor with the dtype and device of the result.

        Returns:
            The updates, shaped like the result of `wholes`.
        """

    def kept(self, pieces: Sequence[Tensor]) -> Any:
        """Return the parts of this rank's pieces that stay on this rank without being sent.

        Args:
            pieces: This rank's piece of every parameter.

        Returns:
            A value to pass to `wholes`.
        """

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return the parts of this rank's pieces that are sent.

        Args:
            pieces: This rank's piece of every parameter.

        Returns:
            The tensors to send to each rank, by group index.
        """

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives from each rank, by group index."""

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Any) -> Tensor:
        """Put together what this rank updates.

        Args:
            received: The data from each rank, as one vector per rank.
            like: An empty tensor with the dtype and device of the result.
            kept: The result of `kept`.

        Returns:
            The rows or matrices that this rank updates, in one tensor.
        """

    def kept_home(self, updates: Tensor) -> Any:
        """Return the parts of the updates computed on this rank that stay here without being sent.

        Args:
            updates: The updates, shaped like the result of `wholes`.

        Returns:
            A value to pass to `home`.
        """

    def sent_home(self, updates: Tensor) -> dict[int, list[Tensor]]:
        """Return the parts of the updates computed on this rank that are sent back.

        Args:
            updates: The updates, shaped like the result of `wholes`.

        Returns:
            The tensors to send to each rank, by group index.
        """

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates this rank receives from each rank, by group index."""

    def home(self, received: dict[int, Tensor], *, like: Tensor, kept: Any) -> list[Tensor]:
        """Put together this rank's piece of every matrix's update.

        Args:
            received: The data from each rank, as one vector per rank.
            like: An empty tensor with the dtype and device of the result.
            kept: The result of `kept_home`.

        Returns:
            One piece per matrix.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather:
    """Request to send this rank's pieces to the ranks that put the matrices together.

    The answer is a list with one tensor per field: what this rank puts together of it.

    Attributes:
        fields: The tensors to send. A field is a list with one tensor per parameter: the directions, the mask, or a
            state of the rule. All fields are sent together. The list is emptied once they are on their way.
        route: Which parts go to which rank.
        dtype: The dtype in which they are sent.
        like: An empty tensor with the dtype and device of the answer.
    """

    fields: list[list[Tensor]]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Scatter:
    """Request to send updates back to the ranks that hold the weights.

    The answer is a list per field with this rank's piece of every parameter.

    Attributes:
        fields: The results computed on this rank, each shaped like the tensors that answered the Gather. The list is
            emptied once they are on their way.
        route: The route of the Gather, which is now taken backwards.
        dtype: The dtype in which they are sent.
        like: An empty tensor with the dtype and device of the answer.
    """

    fields: list[Tensor]
    route: Redistribution
    dtype: torch.dtype
    like: Tensor
