"""Select parts of a parameter's memory, such as the q in a fused q, k and v, or the gates among gates and ups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StridedSlice:
    """The same range of each of several equal stretches of memory, which lie one after another.

    Positions count elements from the beginning of the first stretch.

    Example:
        >>> rows = StridedSlice(count=2, period=4, start=1, stop=3)  # elements 1, 2, 5 and 6 of 8
        >>> rows.between(0, 6)
        3

    Attributes:
        count: The number of stretches.
        period: The number of elements of a stretch.
        start: The offset in each stretch of the first element selected.
        stop: The offset in each stretch after the last one.
    """

    count: int
    period: int
    start: int
    stop: int

    @classmethod
    def whole(cls, numel: int) -> "StridedSlice":
        """Select everything.

        Args:
            numel: The number of elements.

        Returns:
            The slice.
        """
        return cls(count=1, period=numel, start=0, stop=numel)

    def between(self, low: int, high: int) -> int:
        """Count the selected elements in a range of positions.

        Args:
            low: The first position.
            high: The position after the last one.

        Returns:
            The number of elements.
        """
        return self._before(high) - self._before(low)

    def bounds(self, of_part: Sequence[int], *, base: int, size: int, ranks: int) -> list[list[int]]:
        """Return where the ranges of data-parallel ranks meet among the selected elements.

        The stretches lie in the same place of the part of a parameter that each tensor-parallel rank holds.

        Args:
            of_part: The offsets at which the ranges meet in every part, from 0 to its end.
            base: The offset in every part of the first stretch.
            size: The number of elements of all stretches in a part.
            ranks: The number of tensor-parallel ranks.

        Returns:
            For each tensor-parallel rank, the offsets, counted from the first selected element of the first rank on.
        """
        offsets = [min(max(bound - base, 0), size) for bound in of_part]
        return [[self.between(0, rank * size + offset) for offset in offsets] for rank in range(ranks)]

    def parts(self, tensor: Tensor, *, at: int) -> list[Tensor]:
        """Return views of the selected elements of a vector.

        Args:
            tensor: The vector, which holds consecutive elements.
            at: The position of its first element.

        Returns:
            At most three views, in order, none of them empty.
        """
        low, high = at, at + tensor.numel()
        if self.start == 0 and self.stop == self.period:
            return _nonempty([tensor[: max(min(self.count * self.period, high) - low, 0)]])
        # The vector may begin and end within a stretch; the stretches in between are whole.
        first, last = -(-low // self.period), min(high // self.period, self.count)
        if first >= last:
            return _nonempty(
                [self._of_stretch(i, tensor, at) for i in range(low // self.period, -(-high // self.period))]
            )
        body = tensor[first * self.period - low : last * self.period - low].view(-1, self.period)
        return _nonempty(
            [
                *([self._of_stretch(first - 1, tensor, at)] if first * self.period > low else []),
                body[:, self.start : self.stop],
                *([self._of_stretch(last, tensor, at)] if last < self.count and last * self.period < high else []),
            ]
        )

    def _of_stretch(self, index: int, tensor: Tensor, at: int) -> Tensor:
        first = index * self.period - at
        low, high = (min(max(first + offset, 0), tensor.numel()) for offset in (self.start, self.stop))
        return tensor[low:high] if index < self.count else tensor[:0]

    def _before(self, position: int) -> int:
        stretch, offset = divmod(min(max(position, 0), self.count * self.period), self.period)
        return stretch * (self.stop - self.start) + min(max(offset - self.start, 0), self.stop - self.start)


def joined(parts: list[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the parts of a tensor as one.

    Args:
        parts: Views from `StridedSlice.parts`.
        shape: The shape of the result.
        like: Gives dtype and device if the result is empty.

    Returns:
        A view if there is one contiguous part, otherwise a copy.
    """
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0].view(shape)
    if not math.prod(shape):
        return like.new_empty(shape)
    return torch.cat([part.reshape(-1) for part in parts]).view(shape)


def put_back(parts: list[Tensor], values: Tensor) -> None:
    """Write values back to the parts that `joined` has copied.

    Args:
        parts: The same views.
        values: The new values, of any shape, in the order of the parts.
    """
    for part, value in zip(parts, values.flatten().split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view(part.shape))


def _nonempty(parts: list[Tensor]) -> list[Tensor]:
    return [part for part in parts if part.numel()]
