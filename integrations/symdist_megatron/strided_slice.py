"""Parts of a parameter's memory: where q lies in a fused q, k and v, or gates among gates and ups."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StridedSlice:
    """Of each of `count` stretches of `period` elements, one after another, the elements from `start` to `stop`."""

    count: int
    period: int
    start: int
    stop: int

    @classmethod
    def whole(cls, numel: int) -> "StridedSlice":
        """Everything there is."""
        return cls(count=1, period=numel, start=0, stop=numel)

    def between(self, low: int, high: int) -> int:
        """How many of the elements lie at positions from `low` to `high`."""
        return self._before(high) - self._before(low)

    def parts(self, tensor: Tensor, *, at: int) -> list[Tensor]:
        """Views of those elements that a vector has which begins at position `at`: at most three, in order."""
        low, high = at, at + tensor.numel()
        if self.start == 0 and self.stop == self.period:
            return _nonempty([tensor[: max(min(self.count * self.period, high) - low, 0)]])
        # The stretches that are cut by the ends of the vector, and those in between that are whole.
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
        stretch, rest = divmod(min(max(position, 0), self.count * self.period), self.period)
        return stretch * (self.stop - self.start) + min(max(rest - self.start, 0), self.stop - self.start)


def joined(parts: list[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The parts as one tensor: a view where there is one that lies in one shard, else a copy."""
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0].view(shape)
    if not math.prod(shape):
        return like.new_empty(shape)
    return torch.cat([part.reshape(-1) for part in parts]).view(shape)


def put_back(parts: list[Tensor], values: Tensor) -> None:
    """The inverse of `joined` where it copied."""
    for part, value in zip(parts, values.flatten().split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view(part.shape))


def _nonempty(parts: list[Tensor]) -> list[Tensor]:
    return [part for part in parts if part.numel()]
