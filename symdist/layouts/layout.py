"""Where the pieces of a stored tensor lie, independent of the engine that sharded it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from symdist.layouts.grid import Grid, Group

Box: TypeAlias = tuple[range, ...]


@dataclass(frozen=True, kw_only=True)
class DimSplit:
    """A cut of one dimension of the stored tensor into blocks, over one or more axes of the grid.

    Attributes:
        dim: The dimension that is cut.
        axes: The grid axes over which it is cut.
        ranges: The block `(start, stop)` at every coordinate along `axes`, in row-major order. Together the blocks
            cover the dimension exactly once. They may be in any order and may be empty.
    """

    dim: int
    axes: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Interleaving:
    """A dimension that consists of equal stretches, such as gate and up, each of which is divided among all ranks.

    Each rank's block holds its share of every stretch, one share after another. Rules do not depend on the order of
    rows or columns, so the tensor is treated as if this stored order were its own.

    Attributes:
        dim: The dimension.
        parts: The number of stretches.
        ranks: The number of ranks.
    """

    dim: int
    parts: int
    ranks: int

    def applied(self, tensor: Tensor) -> Tensor:
        """Reorder a whole tensor into its stored order.

        Args:
            tensor: The whole tensor, in its original order.

        Returns:
            The whole tensor, in the order in which the ranks store it.
        """
        cut = tensor.unflatten(self.dim, (self.parts, self.ranks, -1))
        return cut.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A stored tensor on the ranks of a grid.

    Every dimension has at most one split, and every grid axis is used by at most one split. Ranks that differ only
    along axes that no split uses hold the same piece: they are replicas.

    Attributes:
        shape: The whole tensor's shape.
        grid: The ranks that hold the tensor; None (default) where only this rank is known to hold it.
        splits: How dimensions are cut; none by default.
        interleaved: Dimensions that are stored in another order; none by default. Splits and boxes refer to the stored
            order.
    """

    shape: tuple[int, ...]
    grid: Grid | None = None
    splits: tuple[DimSplit, ...] = ()
    interleaved: tuple[Interleaving, ...] = ()

    @functools.cached_property
    def group(self) -> Group | None:
        """All ranks that hold the tensor, including this one; None where only this rank is known."""
        return None if self.grid is None else self.grid.group(range(len(self.grid.sizes)))

    def group_of(self, split: DimSplit) -> Group:
        """Return the ranks across which a split cuts the part of the tensor that this rank sees.

        Args:
            split: One of `splits`.

        Returns:
            The ranks whose pieces differ from this rank's only in their block of this split, including this rank.
        """
        assert self.grid is not None
        return self.grid.group(split.axes)

    @functools.cached_property
    def shard_group(self) -> Group | None:
        """The ranks that together hold the tensor once, including this one; None where this rank holds all of it."""
        axes = [axis for split in self.splits for axis in split.axes]
        return self.grid.group(axes) if self.grid is not None and axes else None

    @property
    def everywhere(self) -> "Layout":
        """This layout; see `FlatLayout.everywhere`."""
        return self

    @property
    def completed(self) -> bool:
        """Whether every row on a rank is as long as the layout says; see `FlatLayout.completed`."""
        return True

    @property
    def column_blocks(self) -> tuple[int, ...]:
        """Empty; see `FlatLayout`."""
        return ()

    @property
    def sole_owner(self) -> None:
        """None: even ranks that hold nothing take part."""
        return None

    @property
    def units(self) -> int:
        """How many parts of the tensor may each have an owner: its experts if it is 3-D, otherwise 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @functools.cached_property
    def held(self) -> dict[int, int]:
        """How many elements the ranks of `group` hold, by index; ranks that hold none are left out."""
        return {rank: size for rank, box in enumerate(self.boxes) if (size := numel(box))}

    @functools.cached_property
    def loads(self) -> dict[int, int]:
        """The elements of the largest piece, under one key: ranks hold about the same of every tensor of a layout."""
        return {0: math.prod(self.largest_shape)}

    def loads_of(self, owners: Sequence[int]) -> dict[int, float]:
        """Return what the owners of the tensor hold of it, in elements, under the key of `loads`.

        Args:
            owners: The owner of every unit; all ranks own about the same of all tensors of a layout.

        Returns:
            The share of one rank.
        """
        return {0: math.prod(self.shape) / len(self.candidates)}

    @functools.cached_property
    def candidates(self) -> list[int]:
        """The ranks that may own the tensor, as indices in `group`: all."""
        return list(range(1 if self.group is None else self.group.size))

    def cuts_rows(self, multiple: int) -> bool:
        """Return False: blocks that cut rows are not completed."""
        return False

    def takes_part(self, owners: Sequence[int] = ()) -> bool:
        """Return True: a rank that holds nothing writes an empty piece."""
        return True

    def by_rows(self, *, multiple: int = 1) -> "Layout":
        """Return this layout, since its pieces are blocks already; see `FlatLayout.by_rows`.

        Args:
            multiple: Has no effect.

        Returns:
            `self`.
        """
        return self

    @functools.cached_property
    def box(self) -> Box:
        """This rank's piece, as one range of indices per dimension."""
        return self._box(self.grid.position if self.grid is not None else 0)

    @functools.cached_property
    def boxes(self) -> list[Box]:
        """The piece of every rank of `group`, in the order of the group."""
        if self.grid is None:
            return [self.box]
        return [self._box(position) for position in self.grid.order]

    @functools.cached_property
    def replica_ids(self) -> list[tuple[int, ...]]:
        """For every rank of `group`, an identifier of the copy of the tensor that its piece belongs to."""
        if self.grid is None:
            return [()]
        cut = {axis for split in self.splits for axis in split.axes}
        free = [axis for axis in range(len(self.grid.sizes)) if axis not in cut]
        return [tuple(self.grid.coordinate(position)[axis] for axis in free) for position in self.grid.order]

    @functools.cached_property
    def num_replicas(self) -> int:
        """The number of copies of the tensor."""
        return len(set(self.replica_ids))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return tuple(map(len, self.box))

    @functools.cached_property
    def largest_shape(self) -> tuple[int, ...]:
        """For each dimension, the largest size that any rank holds: the shape of the largest piece."""
        largest = {split.dim: max(stop - start for start, stop in split.ranges) for split in self.splits}
        return tuple(largest.get(dim, size) for dim, size in enumerate(self.shape))

    def at(self, index: int) -> "Layout":
        """Return the layout as another rank sees it.

        Args:
            index: The other rank's index in `group`.

        Returns:
            The layout; `self` where only this rank is known.
        """
        if self.grid is None:
            return self
        return dataclasses.replace(self, grid=self.grid.at(self.grid.order[index]))

    def rows(self, start: int, stop: int) -> "tuple[Layout, range]":
        """Return the layout of some rows of this tensor, as a tensor of their own.

        Args:
            start: The first index along dimension 0, which must not be interleaved.
            stop: The index after the last one.

        Returns:
            The layout, on the same grid, in which ranks may hold nothing; and where this rank's piece of the rows lies
            along dimension 0 of its piece of the whole tensor.
        """
        assert all(interleaving.dim for interleaving in self.interleaved)
        splits = tuple(
            dataclasses.replace(split, ranges=_within(split.ranges, start, stop)) if split.dim == 0 else split
            for split in self.splits
        )
        layout = dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), splits=splits)
        first = min(max(start, self.box[0].start), self.box[0].stop) - self.box[0].start
        return layout, range(first, first + len(layout.box[0]))

    def piece(self, whole: Tensor) -> Tensor:
        """Cut this rank's piece from a whole tensor.

        Args:
            whole: The whole tensor, in its original order.

        Returns:
            The piece; it is a view of `whole` unless a dimension is interleaved.
        """
        for interleaving in self.interleaved:
            whole = interleaving.applied(whole)
        return whole[tuple(slice(side.start, side.stop) for side in self.box)]

    def _box(self, position: int) -> Box:
        box = [range(size) for size in self.shape]
        for split in self.splits:
            assert self.grid is not None
            coordinate, sizes = self.grid.coordinate(position), self.grid.sizes
            index = 0
            for axis in split.axes:
                index = index * sizes[axis] + coordinate[axis]
            box[split.dim] = range(*split.ranges[index])
        return tuple(box)


def cut_along(
    shape: Sequence[int], *, dim: int, sizes: Sequence[int], ranks: Sequence[int], index: int, handle: Any = None
) -> Layout:
    """Return the layout of a tensor cut along one dimension into consecutive blocks, one per rank.

    Args:
        shape: The whole tensor's shape.
        dim: The dimension that is cut.
        sizes: `sizes[i]` is the size of the block on `ranks[i]` and may be 0. The blocks must cover the dimension.
        ranks: The global ranks.
        index: The index of this rank in `ranks`.
        handle: The process group of the ranks; None by default.

    Returns:
        The layout, on a grid of one axis.

    Example:
        >>> cut_along((5, 2), dim=0, sizes=(3, 2), ranks=(0, 1), index=1).local_shape
        (2, 2)
    """
    assert sum(sizes) == shape[dim], "the blocks must cover the dimension"
    grid = Grid(sizes=(len(ranks),), ranks=tuple(ranks), position=index, handles=(handle,))
    return Layout(shape=tuple(shape), grid=grid, splits=(blocks(dim, sizes),))


def blocks(dim: int, sizes: Sequence[int], *, axis: int = 0) -> DimSplit:
    """Return the cut of a dimension into consecutive blocks.

    Args:
        dim: The dimension.
        sizes: The size of the block at each coordinate along `axis`.
        axis: The grid axis; the first by default.

    Returns:
        The cut.
    """
    ends = list(itertools.accumulate(sizes))
    return DimSplit(dim=dim, axes=(axis,), ranges=tuple(zip([0, *ends], ends, strict=False)))


@functools.lru_cache(maxsize=4096)
def _within(ranges: tuple[tuple[int, int], ...], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Return what lies of each range between two indices, counted from the first of these."""
    return tuple((min(max(a, start), stop) - start, min(max(b, start), stop) - start) for a, b in ranges)


def numel(box: Box) -> int:
    """Return the number of elements of a piece."""
    return math.prod(map(len, box))
