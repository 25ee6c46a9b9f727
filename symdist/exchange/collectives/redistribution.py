"""Chooses the redistribution of parameters by how they are stored; also that of parameters whose rule runs in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.exchange.collectives.flat_redistribution import FlatRedistribution, owned_by
from symdist.exchange.collectives.gather_scatter import Batch, Redistribution
from symdist.exchange.collectives.grid_redistribution import GridRedistribution
from symdist.layouts import FlatLayout, Layout
from symdist.layouts.flat import rows_of_team, runs_of_rows


class InPlace:
    """Moves nothing: the rule runs on the pieces as they are stored. It implements `Redistribution`.

    Args:
        compute: The layout of the matrices.
        stored: The layouts of the parameters: the same, or that of vectors of all elements of a matrix.
    """

    gathers = scatters = False

    def __init__(self, compute: Layout, stored: Sequence[Layout | FlatLayout]):
        self.batches: Sequence[Batch] = [Batch(members=range(len(stored)), box=compute.box)]
        self._shape = compute.local_shape
        self._piece_shapes = [layout.local_shape for layout in stored]

    def stacked(self, assembled: Tensor, batch: int) -> Tensor:
        """Return the pieces, `[k, *shape]`."""
        return assembled

    def unstacked(self, updates: Sequence[Tensor], *, like: Tensor) -> Tensor:
        """Return the updates, `[k, *shape]`."""
        return updates[0]

    def kept(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the pieces."""
        return pieces

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return nothing to send."""
        return {}

    def received_pieces(self) -> dict[int, int]:
        """Return nothing to receive."""
        return {}

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Return the pieces, `[k, *shape]`."""
        stack = torch.stack(list(kept)) if len(kept) > 1 else kept[0].unsqueeze(0)
        return stack.view(len(kept), *self._shape)

    def kept_home(self, updates: Tensor) -> Tensor:
        """Return the updates."""
        return updates

    def sent_home(self, updates: Tensor) -> dict[int, list[Tensor]]:
        """Return nothing to send."""
        return {}

    def received_home(self) -> dict[int, int]:
        """Return nothing to receive."""
        return {}

    def home(self, received: dict[int, Tensor], *, like: Tensor, kept: Tensor) -> list[Tensor]:
        """Return this rank's piece of every parameter's update."""
        return [update.reshape(shape) for update, shape in zip(kept.unbind(0), self._piece_shapes, strict=True)]


def redistribution_of(
    stored: Sequence[Layout | FlatLayout],
    compute: Layout,
    *,
    strategy: str,
    owners: Sequence[int],
    multiple: int,
    together: bool,
    by_place: bool,
    travels: bool,
    column_blocks: tuple[int, ...],
    team: bool = False,
) -> Redistribution:
    """Return the redistribution of parameters of one shape.

    Args:
        stored: How the parameters are stored; those of flat layouts alone may be none.
        compute: How the matrices are cut while the rule runs.
        strategy: Where the rule runs: "local", "reduce" or "owner".
        owners: For strategy "owner", the owner of every unit: the group index of a rank, or the number of a team.
        multiple: How many consecutive rows must stay together.
        together: Whether all that this rank updates is one batch, as where its rule asks other ranks.
        by_place: Whether it matters at which row a piece starts.
        travels: Whether any rank sends anything to complete rows or matrices.
        column_blocks: The widths of the column blocks in which flat matrices are stored, if they are.
        team: Whether owners are teams of ranks, over which `compute` cuts a unit; False by default.

    Returns:
        The redistribution.
    """
    flat = [layout for layout in stored if isinstance(layout, FlatLayout)]
    if strategy == "local" or (strategy == "reduce" and stored and not flat):
        return InPlace(compute, stored)
    if stored and not flat:
        layout = next(layout for layout in stored if isinstance(layout, Layout))
        return GridRedistribution(layout, count=len(stored), owners=owners, team=compute if team else None)
    assert compute.group is not None
    if team:
        want = [rows_of_team(compute, owner) for owner in owners]
        box = compute.box
    elif strategy == "owner":
        want = [owned_by(owner, layout.shape) for owner, layout in zip(owners, flat, strict=True)]
        box = tuple(map(range, compute.shape))
    else:
        want = [runs_of_rows(layout.by_rows(multiple=multiple)) for layout in flat]
        box = compute.box
    return FlatRedistribution(
        compute.group,
        have=[layout.runs for layout in flat],
        want=want,
        shape=compute.shape,
        column_blocks=column_blocks,
        box=box if together else None,
        by_place=by_place,
        travels=travels,
    )
