"""Layouts of weights stored as ranges of one long vector, such as ZeRO partitions and flat data-parallel buffers."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from symdist.layouts.grid import Grid, Group
from symdist.layouts.layout import DimSplit, Interleaving, Layout

Range: TypeAlias = tuple[int, int, int]
"""The index of a rank in its group, and the offsets at which its elements start and stop."""


@dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """The layout of a tensor whose elements, in row-major order, are cut into consecutive ranges, one per rank.

    A rank's piece is a vector, which may be empty.

    Attributes:
        shape: The whole tensor's shape.
        group: The ranks that hold the tensor.
        bounds: The offsets at which the ranges meet, from 0 to the number of elements. Range i runs from `bounds[i]` to
            `bounds[i + 1]`.
        rank_order: `rank_order[i]` is the index in the group of the rank that holds range i. Empty (default) means that
            the rank at index i holds range i.
        column_blocks: The widths of the column blocks of a matrix that was cut by columns first, as tensor parallelism
            does. Its elements are then ordered block after block, in row-major order within each block. Empty (default)
            means that the matrix was not cut by columns.

    Raises:
        ValueError: If the attributes contradict each other.

    Example:
        Rank 0 holds the first 5 elements of a `[2, 4]` matrix, rank 1 the other 3:

            layout = FlatLayout(shape=(2, 4), group=Group(ranks=(0, 1), index=0), bounds=(0, 5, 8))
            layout.local_shape  # (5,)
            layout.by_rows().local_shape  # (2, 4): rank 0 holds the first element of both rows
    """

    shape: tuple[int, ...]
    group: Group
    bounds: tuple[int, ...]
    rank_order: tuple[int, ...] = ()
    column_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ascending = all(low <= high for low, high in itertools.pairwise(self.bounds))
        if len(self.bounds) != self.group.size + 1 or not ascending:
            raise ValueError(
                f"bounds {self.bounds} must be {self.group.size + 1} offsets in ascending order, for the "
                f"{self.group.size} ranks of the group"
            )
        if self.bounds[0] != 0 or self.bounds[-1] != math.prod(self.shape):
            raise ValueError(
                f"bounds {self.bounds} must run from 0 to {math.prod(self.shape)}, the number of elements of shape "
                f"{self.shape}"
            )
        if self.rank_order and sorted(self.rank_order) != list(range(self.group.size)):
            raise ValueError(f"rank_order {self.rank_order} must contain each rank 0 to {self.group.size - 1} once")
        if self.column_blocks and (len(self.shape) != 2 or sum(self.column_blocks) != self.shape[1]):
            raise ValueError(
                f"column_blocks {self.column_blocks} must add up to the number of columns of a matrix; the shape is "
                f"{self.shape}"
            )

    def size_at(self, rank: int) -> int:
        """Return how many elements a rank holds.

        Args:
            rank: The rank's index in the group.

        Returns:
            The number of elements.
        """
        index = self.rank_order.index(rank) if self.rank_order else rank
        return self.bounds[index + 1] - self.bounds[index]

    @property
    def shard_group(self) -> Group:
        """The ranks that together hold the tensor once: all of the group."""
        return self.group

    @property
    def num_replicas(self) -> int:
        """The number of copies of the tensor: one."""
        return 1

    @property
    def interleaved(self) -> tuple[Interleaving, ...]:
        """The dimensions that are stored in another order: none."""
        return ()

    @property
    def completed(self) -> bool:
        """Whether pieces consist of whole rows and columns; if not, ranks first complete the rows that are cut."""
        return False

    @property
    def units(self) -> int:
        """How many parts of the tensor may each have an owner: one."""
        return 1

    @functools.cached_property
    def held(self) -> dict[int, int]:
        """How many elements the ranks of `group` hold, by index; ranks that hold none are left out."""
        return {rank: stop - start for rank, start, stop in self.runs}

    @property
    def loads(self) -> dict[int, int]:
        """What each rank holds, in elements, for sums over tensors of which the largest counts: `held`."""
        return self.held

    def loads_of(self, owners: Sequence[int]) -> dict[int, float]:
        """Return what the owners of the tensor hold of it, in elements.

        Args:
            owners: The owner of the tensor, as an index in `group`.

        Returns:
            The elements by owner.
        """
        return {owner: float(math.prod(self.shape)) for owner in owners}

    @functools.cached_property
    def candidates(self) -> list[int]:
        """The ranks that may own the tensor: those that hold at least half as much of it as any other.

        As owners they receive least.
        """
        most = max(self.held.values())
        return [rank for rank, size in self.held.items() if 2 * size >= most]

    def cuts_rows(self, multiple: int) -> bool:
        """Return whether rows, or blocks of as many rows, are cut between ranks.

        Args:
            multiple: The number of rows that must stay together as a block.
        """
        return any(bound % (self.width * multiple) for bound in self.bounds)

    def takes_part(self, owners: Sequence[int] = ()) -> bool:
        """Return whether this rank holds or owns any of the tensor; if not, it need not know of it.

        Args:
            owners: The owner of the tensor, as an index in `group`; empty (default) if it has none.
        """
        return self.group.index in self.held or self.group.index in owners

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return (self.size_at(self.group.index),)

    @property
    def mine(self) -> tuple[int, int]:
        """The offsets at which this rank's range starts and stops."""
        index = self.rank_order.index(self.group.index) if self.rank_order else self.group.index
        return self.bounds[index], self.bounds[index + 1]

    @property
    def width(self) -> int:
        """The number of elements in a row."""
        return math.prod(self.shape[1:])

    @functools.cached_property
    def runs(self) -> tuple[Range, ...]:
        """The nonempty ranges with the ranks that hold them, in order of offset."""
        return _runs(self.bounds, self.rank_order)

    @functools.cached_property
    def sole_owner(self) -> int | None:
        """The index in the group of the only rank that holds any elements; None where several ranks do."""
        return self.runs[0][0] if len(self.runs) == 1 else None

    @functools.cached_property
    def everywhere(self) -> Layout:
        """The layout in which each of these ranks holds the whole tensor, as an owner does once it has assembled it."""
        return Layout(shape=self.shape, grid=_line(self.group))

    def at(self, index: int) -> "FlatLayout":
        """Return the layout as another rank sees it.

        Args:
            index: The other rank's index in `group`.

        Returns:
            The layout.
        """
        return dataclasses.replace(self, group=Group(ranks=self.group.ranks, index=index))

    def by_rows(self, *, multiple: int = 1) -> Layout:
        """Return the nearest layout in which every rank holds whole rows.

        Args:
            multiple: The number of rows that must stay together as a block; 1 by default.

        Returns:
            A layout that gives each block of rows to the rank that holds the block's first element.
        """
        block = self.width * multiple
        ranges = list(itertools.pairwise(-(-bound // block) * multiple for bound in self.bounds))
        if self.rank_order:
            ranges = [ranges[self.rank_order.index(rank)] for rank in range(self.group.size)]
        return Layout(
            shape=self.shape, grid=_line(self.group), splits=(DimSplit(dim=0, axes=(0,), ranges=tuple(ranges)),)
        )

    def rows(self, start: int, stop: int) -> "tuple[FlatLayout, range]":
        """Return the layout of some rows of this tensor, as a tensor of their own.

        Args:
            start: The first row.
            stop: The row after the last one.

        Returns:
            The layout, in which ranks may hold nothing; and where this rank's elements of the rows lie among its
            elements of the whole tensor.

        Raises:
            ValueError: If a rank holds elements of several column blocks, so that these are not all together.
        """
        # The rows are consecutive elements of each block of columns.
        runs, end = [], 0
        for width in self.column_blocks or (self.width,):
            runs.append((end + start * width, end + stop * width))
            end += self.shape[0] * width

        def before(offset: int) -> int:
            return sum(min(max(offset, low), high) - low for low, high in runs)

        bounds = tuple(map(before, self.bounds))
        if any(sum(low < b and a < high for low, high in runs) > 1 for a, b in itertools.pairwise(self.bounds)):
            raise ValueError(
                f"bounds {self.bounds} give a rank elements of several of the column blocks {self.column_blocks}, so "
                "that its elements of some rows are not together; divide the columns over the ranks"
            )
        layout = dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), bounds=bounds)
        mine = self.mine
        first = next((max(low, mine[0]) - mine[0] for low, high in runs if low < mine[1] and mine[0] < high), 0)
        return layout, range(first, first + layout.local_shape[0])

    def piece(self, whole: Tensor) -> Tensor:
        """Cut this rank's piece from a whole tensor.

        Args:
            whole: The whole tensor.

        Returns:
            The piece, a vector.
        """
        start, stop = self.mine
        return elements_of(whole.unsqueeze(0), column_blocks=self.column_blocks)[0, start:stop]


def matrices_of(elements: Tensor, shape: tuple[int, ...], *, column_blocks: tuple[int, ...]) -> Tensor:
    """Reshape the elements of several matrices into the matrices.

    Args:
        elements: `[k, n]`, all n elements of each of k matrices.
        shape: The shape `(p, q)` of one matrix.
        column_blocks: The widths of the column blocks that order the elements, or empty; see `FlatLayout`.

    Returns:
        `[k, p, q]`.
    """
    if not column_blocks:
        return elements.view(elements.shape[0], *shape)
    rows = shape[0]
    blocks = elements.split([rows * width for width in column_blocks], dim=1)
    return torch.cat([block.view(-1, rows, block.shape[1] // rows) for block in blocks], dim=2)


def elements_of(matrices: Tensor, *, column_blocks: tuple[int, ...]) -> Tensor:
    """Undo `matrices_of`.

    Args:
        matrices: `[k, p, q]`.
        column_blocks: The widths of the column blocks that order the elements, or empty; see `FlatLayout`.

    Returns:
        `[k, n]`, all n elements of each of the k matrices.
    """
    if not column_blocks:
        return matrices.flatten(1)
    return torch.cat([block.flatten(1) for block in matrices.split(column_blocks, dim=2)], dim=1)


def runs_of_rows(layout: Layout) -> tuple[Range, ...]:
    """Return the ranges of elements that the ranks hold under a layout in whole rows.

    Args:
        layout: A layout with a single split, over the rows.

    Returns:
        The nonempty ranges with the ranks that hold them, in order of offset.
    """
    width = math.prod(layout.shape[1:])
    (split,) = layout.splits
    runs = [(i, a * width, b * width) for i, (a, b) in enumerate(split.ranges) if a < b and width]
    return tuple(sorted(runs, key=lambda run: run[1]))


def rows_of_team(layout: Layout, team: int) -> tuple[Range, ...]:
    """Return the ranges of elements that the ranks of a team hold of a matrix.

    Args:
        layout: A layout that cuts the rows over the ranks of every team.
        team: The number of the team.

    Returns:
        The ranges with the ranks that hold them, in order of offset.
    """
    width = math.prod(layout.shape[1:])
    (split,) = layout.splits
    first = team * len(split.ranges)
    return tuple((first + i, a * width, b * width) for i, (a, b) in enumerate(split.ranges))


def flat_vector(sizes: list[int], *, ranks: int, align: int = 1) -> list[tuple[int, ...]]:
    """Compute the bounds of tensors that lie one after another in a vector divided equally among ranks.

    Args:
        sizes: The number of elements of each tensor.
        ranks: The number of ranks.
        align: The size of each rank's part is a multiple of this many elements; 1 by default.

    Returns:
        The bounds of each tensor, see `FlatLayout`.

    Example:
        >>> flat_vector([6, 4], ranks=2)
        [(0, 5, 6), (0, 0, 4)]
    """
    part = -(-sum(sizes) // (ranks * align)) * align
    return [flat_bounds(start, size, part=part, ranks=ranks) for start, size in zip(_starts(sizes), sizes, strict=True)]


@functools.lru_cache(maxsize=65536)
def flat_bounds(start: int, size: int, *, part: int, ranks: int) -> tuple[int, ...]:
    """Compute the bounds of one tensor in a vector divided equally among ranks.

    Args:
        start: The offset of the tensor in the vector.
        size: The number of elements of the tensor.
        part: The number of elements of the vector that each rank holds.
        ranks: The number of ranks.

    Returns:
        The bounds, see `FlatLayout`.
    """
    return (*(min(max(rank * part - start, 0), size) for rank in range(ranks)), size)


def replicated(shape: tuple[int, ...], group: Group) -> Layout:
    """Return the layout of a tensor that is the same on all ranks of a group.

    Args:
        shape: The tensor's shape.
        group: The ranks that hold the tensor.

    Returns:
        A layout without splits.
    """
    return Layout(shape=shape, grid=_line(group)) if group.size > 1 else Layout(shape=shape)


def _starts(sizes: list[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]


@functools.lru_cache(maxsize=65536)
def _runs(bounds: tuple[int, ...], order: tuple[int, ...]) -> tuple[Range, ...]:
    return tuple((order[i] if order else i, a, b) for i, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b)


def _line(group: Group) -> Grid:
    """Arrange the ranks of a group as a grid of one axis."""
    return Grid(sizes=(group.size,), ranks=group.ranks, position=group.index, handles=(group.handle,))
