"""Stochastic rounding to bfloat16: up or down by chance, so that small updates are not lost on average."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def write(target: Tensor, value: Tensor) -> None:
    """Write a value to a weight, rounded to the nearest; no finite value becomes inf in float16, which ends at 65504.

    Args:
        target: The weight, in any dtype and strides.
        value: The value, in the same shape.
    """
    if target.dtype == torch.float16:
        value = value.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    target.copy_(value)


class StochasticRounding:
    """Rounds numbers to bfloat16 at random: up with the share of the gap below that they have passed.

    The chance is a number from a generator that starts anew for each tensor of each step. All ranks that hold one piece
    round it alike, and a resumed run rounds as if it had not stopped.

    Args:
        seed: The seed, the same on all ranks.
        step: The number of the step.

    Example:
        >>> StochasticRounding(seed=0, step=1).store([weight], [exact], keys=["head.weight"])
    """

    def __init__(self, *, seed: int, step: int):
        self._seed = seed
        self._step = step

    def write(self, target: Tensor, value: Tensor, *, key: Hashable) -> None:
        """Write a value to a weight: rounded by chance if the weight is bfloat16, otherwise as it is.

        Args:
            target: The weight, in any dtype and strides.
            value: The value, in float32 or wider, in the same shape.
            key: As for `store`.
        """
        if target.dtype == torch.bfloat16:
            self.store([target], [value], keys=[key])
        else:
            target.copy_(value)

    def store(self, targets: Sequence[Tensor], values: Sequence[Tensor], *, keys: Sequence[Hashable]) -> None:
        """Write values to tensors, rounded.

        Args:
            targets: bfloat16 tensors, of any strides.
            values: The values, finite, in float32 or wider, in the same shapes.
            keys: For each tensor, what tells it from others and is the same on all ranks that hold it.
        """
        for target, value, key in zip(targets, values, keys, strict=True):
            generator = torch.Generator(device=value.device)
            generator.manual_seed(zlib.crc32(repr((self._seed, self._step, key)).encode()))
            wide = value.to(torch.float32)
            # The lower half of float32's bits is what bfloat16 lacks. A carry into the upper half rounds up, and comes
            # as often as the lower half is large.
            noise = torch.randint(0, 1 << 16, wide.shape, generator=generator, dtype=torch.int32, device=value.device)
            bits = noise.add_(wide.view(torch.int32)).bitwise_and_(-(1 << 16))
            target.copy_(bits.view(torch.float32))
