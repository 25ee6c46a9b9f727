"""Layouts of weights that tensor parallelism cuts into blocks; data-parallel ranks hold copies or ranges of these."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from symdist.layouts.flat import FlatLayout
from symdist.layouts.grid import Grid, Group
from symdist.layouts.groups import ascending
from symdist.layouts.layout import Layout, blocks


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """A grid of data-parallel and tensor-parallel ranks.

    Attributes:
        data: This rank's data-parallel group.
        across: This rank's tensor-parallel group.
        columns: For each tensor-parallel rank, the data-parallel ranks that hold the same part of a parameter.
    """

    data: Group
    across: Group
    columns: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def grid(self) -> Grid | None:
        """All ranks, with an axis for each of the two kinds that has more than one rank; None for a single rank."""
        return _grid([self.data, self.across], [rank for row in zip(*self.columns, strict=True) for rank in row])

    @functools.cached_property
    def tensor_grid(self) -> Grid | None:
        """The tensor-parallel ranks alone; None for a single rank."""
        return _grid([self.across], list(self.across.ranks))

    @functools.cached_property
    def everyone(self) -> Group:
        """The group of all ranks of the grid."""
        assert self.grid is not None
        return self.grid.group(range(len(self.grid.sizes)))

    @functools.cached_property
    def rank_order(self) -> tuple[int, ...]:
        """The indices in `everyone` of all ranks, in the order of `columns`."""
        index = {rank: i for i, rank in enumerate(self.everyone.ranks)}
        return tuple(index[rank] for column in self.columns for rank in column)

    def copies(self, shape: tuple[int, ...], *, cut: int | None, sizes: Sequence[int], alone: bool = False) -> Layout:
        """Return the layout of a tensor whose blocks are the same on all data-parallel ranks.

        Args:
            shape: The whole tensor's shape.
            cut: The dimension that tensor parallelism cuts; None if every rank holds the whole tensor.
            sizes: The size of each tensor-parallel rank's block along `cut`.
            alone: Whether other data-parallel ranks are to be left out. False by default.

        Returns:
            The layout.
        """
        grid = self.tensor_grid if alone else self.grid
        if cut is None or grid is None:
            return Layout(shape=shape, grid=grid)
        return Layout(shape=shape, grid=grid, splits=(blocks(cut, sizes, axis=len(grid.sizes) - 1),))

    def ranges(
        self, shape: tuple[int, ...], *, cut: int | None, sizes: Sequence[int], bounds: Sequence[Sequence[int]]
    ) -> FlatLayout:
        """Return the layout of a tensor whose blocks are cut into ranges of elements over the data-parallel ranks.

        Args:
            shape: The whole tensor's shape.
            cut: As for `copies`.
            sizes: As for `copies`.
            bounds: For each tensor-parallel rank, the offsets in its block at which the ranges of its data-parallel
                ranks meet; see `FlatLayout`. If `cut` is None, those of the first are taken.

        Returns:
            The layout, which puts the memory of all tensor-parallel ranks one after another.
        """
        if cut is None:
            return FlatLayout(shape=shape, group=self.data, bounds=tuple(bounds[0]))
        joined = [0]
        for of_block in bounds:
            joined += [joined[-1] - of_block[0] + bound for bound in of_block[1:]]
        return FlatLayout(
            shape=shape,
            group=self.everyone,
            bounds=tuple(joined),
            rank_order=self.rank_order,
            column_blocks=tuple(sizes) if cut == 1 and len(shape) == 2 else (),
        )


def find_rank_grid(data: Any, across: Any) -> RankGrid:
    """Gather the rank grid of two process groups; all ranks of `across` must call it.

    Args:
        data: This rank's data-parallel process group.
        across: This rank's tensor-parallel process group.

    Returns:
        The rank grid.

    Raises:
        ValueError: If the data-parallel groups of different tensor-parallel ranks overlap or differ in size, or a group
            does not number its ranks in ascending order.
    """
    data_group, tensor_group = ascending(data), ascending(across)
    columns: list[Any] = [None] * tensor_group.size
    dist.all_gather_object(columns, list(data_group.ranks), group=across)
    ranks = [rank for column in columns for rank in column]
    if len(set(ranks)) != data_group.size * tensor_group.size:
        raise ValueError(
            f"symdist: the data-parallel groups {columns} of tensor-parallel ranks {tensor_group.ranks} overlap or "
            "differ in size; initialize the process groups so that they form a grid"
        )
    return RankGrid(data=data_group, across=tensor_group, columns=tuple(map(tuple, columns)))


def _grid(groups: Sequence[Group], ranks: list[int]) -> Grid | None:
    large = [group for group in groups if group.size > 1]
    if not large:
        return None
    position = 0
    for group in large:
        position = position * group.size + group.index
    return Grid(
        sizes=tuple(group.size for group in large),
        ranks=tuple(ranks),
        position=position,
        handles=tuple(group.handle for group in large),
    )
