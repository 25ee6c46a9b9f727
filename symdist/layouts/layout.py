"""Where the pieces of a stored tensor lie, said without naming the engine that put them there."""

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

    `ranges` has the block `(start, stop)` of every coordinate along `axes`, row-major. Blocks cover the dimension once,
    in any order, and may be empty.
    """

    dim: int
    axes: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Interleaving:
    """A dimension that is stored in another order: its `parts` equal stretches, gate and up say, dealt to `ranks`.

    Each rank's block has its share of every stretch, one after the other. Rules do not mind in what order rows or
    columns stand, so the blocks together are what is seen as the tensor.
    """

    dim: int
    parts: int
    ranks: int

    def applied(self, tensor: Tensor) -> Tensor:
        """A whole tensor in the order in which it is stored."""
        cut = tensor.unflatten(self.dim, (self.parts, self.ranks, -1))
        return cut.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A stored tensor of global `shape` on the ranks of a grid; no grid where only this rank is known of.

    Every dimension has at most one split, every axis serves at most one. Ranks that differ only along axes that no
    split uses hold the same piece: they are replicas. What is said of a dimension that is `interleaved` is said of it
    in the order in which it is stored.
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
        """The ranks that hold other blocks of this split, and otherwise what this rank holds."""
        assert self.grid is not None
        return self.grid.group(split.axes)

    @functools.cached_property
    def shard_group(self) -> Group | None:
        """The ranks that together hold the tensor once, this one among them; None where this rank holds all of it."""
        axes = [axis for split in self.splits for axis in split.axes]
        return self.grid.group(axes) if self.grid is not None and axes else None

    @functools.cached_property
    def box(self) -> Box:
        """This rank's piece, as ranges of every dimension."""
        return self._box(self.grid.position if self.grid is not None else 0)

    @functools.cached_property
    def boxes(self) -> list[Box]:
        """The piece of every rank of `group`, in its order."""
        if self.grid is None:
            return [self.box]
        return [self._box(position) for position in self.grid.order]

    @functools.cached_property
    def replica_ids(self) -> list[tuple[int, ...]]:
        """Of every rank of `group`, which copy of the tensor its piece belongs to."""
        if self.grid is None:
            return [()]
        cut = {axis for split in self.splits for axis in split.axes}
        free = [axis for axis in range(len(self.grid.sizes)) if axis not in cut]
        return [tuple(self.grid.coordinate(position)[axis] for axis in free) for position in self.grid.order]

    @property
    def num_replicas(self) -> int:
        """How many copies of the tensor there are."""
        return len(set(self.replica_ids))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return tuple(map(len, self.box))

    @functools.cached_property
    def largest_shape(self) -> tuple[int, ...]:
        """The most that any rank holds of each dimension: the shape of the largest piece."""
        largest = {split.dim: max(stop - start for start, stop in split.ranges) for split in self.splits}
        return tuple(largest.get(dim, size) for dim, size in enumerate(self.shape))

    def at(self, index: int) -> "Layout":
        """The layout as the rank `index` of `group` sees it."""
        if self.grid is None:
            return self
        return dataclasses.replace(self, grid=self.grid.at(self.grid.order[index]))

    def piece(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor, a view of it where nothing is interleaved."""
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
    """A tensor cut along one dimension into consecutive blocks, one a rank: `sizes[i]` on `ranks[i]`.

    `index` is this rank's place among `ranks`, `handle` their process group.
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert ends[-1] == shape[dim], "the blocks must cover the dimension"
    ranges = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
    grid = Grid(sizes=(len(ranks),), ranks=tuple(ranks), position=index, handles=(handle,))
    return Layout(shape=tuple(shape), grid=grid, splits=(DimSplit(dim=dim, axes=(0,), ranges=ranges),))


def numel(box: Box) -> int:
    """The number of elements of a piece."""
    return math.prod(map(len, box))
