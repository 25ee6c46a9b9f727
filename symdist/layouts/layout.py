"""Where the pieces of a stored tensor lie, independent of the engine that put them there."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from symdist.layouts.grid import Grid, Group

Box: TypeAlias = tuple[range, ...]


@dataclass(frozen=True, kw_only=True)
class DimSplit:
    """One dimension of the stored tensor, cut into blocks over some axes of the grid.

    Attributes:
        dim: The dimension.
        axes: The grid axes it is cut over.
        ranges: The block `(start, stop)` at every coordinate along `axes`, in row-major order. Blocks cover the
            dimension once, in any order, and may be empty.
    """

    dim: int
    axes: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Interleaving:
    """A dimension whose equal stretches, such as gate and up, are each dealt out to all ranks.

    Each rank's block holds its share of every stretch, one after the other. Rules do not depend on the order of rows or
    columns, so the tensor is seen in this stored order.

    Attributes:
        dim: The dimension.
        parts: Number of stretches.
        ranks: Number of ranks.
    """

    dim: int
    parts: int
    ranks: int

    def applied(self, tensor: Tensor) -> Tensor:
        """Put a whole tensor into the order in which it is stored."""
        cut = tensor.unflatten(self.dim, (self.parts, self.ranks, -1))
        return cut.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A stored tensor on the ranks of a grid.

    Every dimension has at most one split, and every grid axis serves at most one. Ranks that differ only along axes
    that no split uses hold the same piece: they are replicas.

    Attributes:
        shape: The whole tensor's shape.
        grid: The ranks; None (default) where only this rank is known.
        splits: How dimensions are cut; none by default.
        interleaved: Dimensions stored in another order; none by default. Splits and boxes refer to the stored order.
    """

    shape: tuple[int, ...]
    grid: Grid | None = None
    splits: tuple[DimSplit, ...] = ()
    interleaved: tuple[Interleaving, ...] = ()

    @functools.cached_property
    def group(self) -> Group | None:
        """All ranks that hold the tensor, this one among them."""
        return None if self.grid is None else self.grid.group(range(len(self.grid.sizes)))

    def group_of(self, split: DimSplit) -> Group:
        """Return the ranks that hold the other blocks of this split, but otherwise what this rank holds."""
        assert self.grid is not None
        return self.grid.group(split.axes)

    @functools.cached_property
    def shard_group(self) -> Group | None:
        """The ranks that together hold the tensor once, this one among them; None where this rank holds all of it."""
        axes = [axis for split in self.splits for axis in split.axes]
        return self.grid.group(axes) if self.grid is not None and axes else None

    @functools.cached_property
    def box(self) -> Box:
        """This rank's piece, as one range per dimension."""
        return self._box(self.grid.position if self.grid is not None else 0)

    @functools.cached_property
    def boxes(self) -> list[Box]:
        """The piece of every rank of `group`, in the group's order."""
        if self.grid is None:
            return [self.box]
        return [self._box(position) for position in self.grid.order]

    @functools.cached_property
    def replica_ids(self) -> list[tuple[int, ...]]:
        """For every rank of `group`, which copy of the tensor its piece belongs to."""
        if self.grid is None:
            return [()]
        cut = {axis for split in self.splits for axis in split.axes}
        free = [axis for axis in range(len(self.grid.sizes)) if axis not in cut]
        return [tuple(self.grid.coordinate(position)[axis] for axis in free) for position in self.grid.order]

    @property
    def num_replicas(self) -> int:
        """The number of copies of the tensor."""
        return len(set(self.replica_ids))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return tuple(map(len, self.box))

    @functools.cached_property
    def largest_shape(self) -> tuple[int, ...]:
        """The largest extent of each dimension on any rank: the shape of the largest piece."""
        largest = {split.dim: max(stop - start for start, stop in split.ranges) for split in self.splits}
        return tuple(largest.get(dim, size) for dim, size in enumerate(self.shape))

    def at(self, index: int) -> "Layout":
        """Return the layout as the rank at place `index` of `group` sees it."""
        if self.grid is None:
            return self
        return dataclasses.replace(self, grid=self.grid.at(self.grid.order[index]))

    def piece(self, whole: Tensor) -> Tensor:
        """Cut this rank's piece from a whole tensor; a view of it where nothing is interleaved."""
        for each in self.interleaved:
            whole = each.applied(whole)
        return whole[tuple(slice(side.start, side.stop) for side in self.box)]

    def _box(self, position: int) -> Box:
        box = [range(size) for size in self.shape]
        for split in self.splits:
            assert self.grid is not None
            coordinate, sizes = self.grid.coordinate(position), self.grid.sizes
            place = 0
            for axis in split.axes:
                place = place * sizes[axis] + coordinate[axis]
            box[split.dim] = range(*split.ranges[place])
        return tuple(box)


def cut_along(
    shape: Sequence[int], *, dim: int, sizes: Sequence[int], ranks: Sequence[int], index: int, handle: Any = None
) -> Layout:
    """Return the layout of a tensor cut along one dimension into consecutive blocks, one per rank.

    Args:
        shape: The whole tensor's shape.
        dim: The dimension that is cut.
        sizes: `sizes[i]` is the size of the block on `ranks[i]`; together they cover the dimension. Sizes may be 0.
        ranks: The global ranks.
        index: This rank's place among `ranks`.
        handle: The process group of the ranks; None by default.
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert ends[-1] == shape[dim], "the blocks must cover the dimension"
    ranges = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
    grid = Grid(sizes=(len(ranks),), ranks=tuple(ranks), position=index, handles=(handle,))
    return Layout(shape=tuple(shape), grid=grid, splits=(DimSplit(dim=dim, axes=(0,), ranges=ranges),))


def numel(box: Box) -> int:
    """Return the number of elements of a piece."""
    return math.prod(map(len, box))
