"""The ranks that hold a weight, arranged by what they share."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that talk to each other: `ranks` ascending, `index` this rank's place among them.

    `handle` is their process group where one is at hand; else `through` are process groups that together connect them,
    and the transport finds or makes one. Two groups of the same ranks are equal.
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
    """An array of ranks with an axis for each way of differing: `ranks` row-major, `position` this rank's place.

    `handles` has the process group through this rank along each axis, as far as they exist.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    position: int
    handles: tuple[Any, ...] = field(compare=False, repr=False, default=())

    def __post_init__(self) -> None:
        assert math.prod(self.sizes) == len(self.ranks)

    def at(self, position: int) -> "Grid":
        """The grid as the rank at another position sees it; without process groups, which that rank alone has."""
        return Grid(sizes=self.sizes, ranks=self.ranks, position=position)

    def coordinate(self, position: int) -> tuple[int, ...]:
        """Of a position along every axis."""
        found = []
        for size in reversed(self.sizes):
            position, along = divmod(position, size)
            found.append(along)
        return tuple(reversed(found))

    @functools.cached_property
    def _coordinates(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.sizes)))

    @functools.cached_property
    def order(self) -> list[int]:
        """The positions by ascending rank: the order in which process groups number them."""
        return sorted(range(len(self.ranks)), key=self.ranks.__getitem__)

    def group(self, axes: Sequence[int]) -> Group:
        """The ranks that differ from this one along `axes` only."""
        here = self.coordinate(self.position)
        fixed = [axis for axis in range(len(self.sizes)) if axis not in axes]
        ranks = tuple(
            sorted(
                rank
                for rank, there in zip(self.ranks, self._coordinates, strict=True)
                if all(there[axis] == here[axis] for axis in fixed)
            )
        )
        handles = tuple(self.handles[axis] for axis in axes) if self.handles else ()
        return Group(
            ranks=ranks,
            index=ranks.index(self.ranks[self.position]),
            handle=handles[0] if len(handles) == 1 else None,
            through=handles,
        )
