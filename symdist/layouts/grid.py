"""Groups and grids: the ranks that hold a weight, and how they are arranged by the pieces that they hold."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate with each other.

    Groups of the same ranks, as the same rank sees them, compare equal.

    Attributes:
        ranks: The global ranks, in ascending order.
        index: The index of this rank in `ranks`.
        handle: The process group of these ranks; None (default) where it is not known.
        through: Process groups that together connect the ranks. Without a `handle`, the transport finds or makes a
            process group from them. Empty by default.
    """

    ranks: tuple[int, ...]
    index: int
    handle: Any = field(compare=False, repr=False, default=None)
    through: tuple[Any, ...] = field(compare=False, repr=False, default=())

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An array of ranks, like a device mesh.

    Attributes:
        sizes: The number of ranks along each axis.
        ranks: The global ranks, in row-major order.
        position: The index of this rank in `ranks`.
        handles: For each axis, the process group along that axis that contains this rank; empty (default) where these
            are not known.

    Example:
        >>> grid = Grid(sizes=(2, 3), ranks=(0, 1, 2, 3, 4, 5), position=4)
        >>> grid.coordinate(grid.position)
        (1, 1)
        >>> grid.group([1]).ranks
        (3, 4, 5)
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    position: int
    handles: tuple[Any, ...] = field(compare=False, repr=False, default=())

    def __post_init__(self) -> None:
        assert math.prod(self.sizes) == len(self.ranks)

    def at(self, position: int) -> "Grid":
        """Return the grid as the rank at another position sees it.

        Args:
            position: The other rank's index in `ranks`.

        Returns:
            The grid without process groups, because only the other rank has those.
        """
        return Grid(sizes=self.sizes, ranks=self.ranks, position=position)

    def coordinate(self, position: int) -> tuple[int, ...]:
        """Return the coordinates of a position.

        Args:
            position: An index in `ranks`.

        Returns:
            The coordinate along every axis.
        """
        coordinates = []
        for size in reversed(self.sizes):
            position, coordinate = divmod(position, size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    @functools.cached_property
    def _coordinates(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.sizes)))

    @functools.cached_property
    def order(self) -> list[int]:
        """The positions in ascending order of their global ranks, which is the order within a process group."""
        return sorted(range(len(self.ranks)), key=self.ranks.__getitem__)

    def group(self, axes: Sequence[int]) -> Group:
        """Return the ranks that differ from this one only along the given axes.

        Args:
            axes: The axes along which the ranks may differ.

        Returns:
            The group of these ranks, which includes this rank.
        """
        local_coordinate = self.coordinate(self.position)
        fixed = [axis for axis in range(len(self.sizes)) if axis not in axes]
        ranks = tuple(
            sorted(
                rank
                for rank, coordinate in zip(self.ranks, self._coordinates, strict=True)
                if all(coordinate[axis] == local_coordinate[axis] for axis in fixed)
            )
        )
        handles = tuple(self.handles[axis] for axis in axes) if self.handles else ()
        return Group(
            ranks=ranks,
            index=ranks.index(self.ranks[self.position]),
            handle=handles[0] if len(handles) == 1 else None,
            through=handles,
        )
