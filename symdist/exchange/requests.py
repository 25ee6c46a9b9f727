"""What a placement, as opposed to a rule, asks of the ranks: to put pieces together, and to take them apart."""

from dataclasses import dataclass

from torch import Tensor

from symdist.layouts import Layout


@dataclass(frozen=True, eq=False, kw_only=True)
class Ship:
    """Send this rank's `pieces` to the owners; answered with the whole tensors this rank owns, in order.

    All pieces are of one `layout`; `owners[i]` is the group index of the rank that puts piece i together.
    """

    pieces: list[Tensor]
    owners: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, eq=False, kw_only=True)
class Return:
    """Send the whole tensors this rank owns back; answered with this rank's piece of every one of the `owners`."""

    wholes: list[Tensor]
    owners: tuple[int, ...]
    layout: Layout
    like: Tensor
    """A piece, for the dtype and device of what comes back where this rank owns nothing."""
