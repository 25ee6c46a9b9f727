"""Where the pieces of a stored tensor lie, said without naming the engine that put them there."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Group:
    """An ordered set of ranks that hold the pieces of one tensor.

    `ranks` are global ranks in the order of the pieces, `index` is this rank's place among them, `handle` is what
    the transport needs to reach them. Two groups of the same ranks are equal.
    """

    ranks: tuple[int, ...]
    index: int
    handle: Any = field(compare=False, repr=False, default=None)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One dimension of the stored tensor cut into consecutive blocks, one a rank of the group; blocks may be empty."""

    dim: int
    sizes: tuple[int, ...]
    group: Group

    @property
    def here(self) -> range:
        """The indices along `dim` that this rank holds."""
        start = sum(self.sizes[: self.group.index])
        return range(start, start + self.sizes[self.group.index])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A stored tensor of global `shape`, whole on this rank or cut along one dimension."""

    shape: tuple[int, ...]
    split: Split | None = None

    def shape_on(self, index: int) -> tuple[int, ...]:
        """The shape of the piece on the group's rank `index`; the whole shape where there is no split."""
        if self.split is None:
            return self.shape
        return tuple(self.split.sizes[index] if dim == self.split.dim else size for dim, size in enumerate(self.shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return self.shape_on(self.split.group.index) if self.split else self.shape

    def numel_on(self, index: int) -> int:
        """The number of elements of the piece on the group's rank `index`."""
        return math.prod(self.shape_on(index))
