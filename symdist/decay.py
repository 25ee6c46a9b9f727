"""Decoupled weight decay: of all weights or, if cautious, only of those that the update does not move away from 0."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from symdist.rounding import StochasticRounding, write


def decaying(weight: Tensor, update: Tensor) -> Tensor:
    """Return 1 where subtracting the update does not move a weight away from zero, and 0 elsewhere.

    Source: cautious weight decay (arXiv 2510.12402), which decays only these elements.

    Args:
        weight: A weight of any shape.
        update: Its update, of the same shape.

    Returns:
        The mask, in the shape of the weight and the dtype of the update.
    """
    return (weight * update >= 0).to(update.dtype)


def decay_and_subtract(
    weights: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    cautious: bool,
    moving: list[Tensor] | None = None,
    rounding: StochasticRounding | None = None,
    keys: Sequence[Hashable] = (),
) -> None:
    """Decay the weights and subtract the updates: `W ← (1 − lr·weight_decay·c)·W − lr·U` in place.

    The computation uses the updates' dtype, even if the weights' dtype is narrower.

    Args:
        weights: This rank's pieces of the weights, in any dtype and strides; at least one.
        updates: U, in the shapes of the weights and in the same or a wider dtype.
        lr: The learning rate; a number, or 0-d on the device of the weights.
        weight_decay: The weight decay, likewise: a step subtracts `lr · weight_decay` times the weight.
        cautious: Whether c is 0 where the update moves the weight away from zero (see `decaying`) and 1 elsewhere. If
            False, c is 1 everywhere.
        moving: For each weight, a mask that is 0 where the weight must not decay because it is not to move (its update
            is already 0), and 1 elsewhere. None (default) means that all elements may move.
        rounding: How bfloat16 weights are rounded; None (default) to the nearest.
        keys: The key of each weight for `rounding`.

    Example:
        >>> weight = torch.ones(2)
        >>> decay_and_subtract([weight], [torch.tensor([1.0, -1.0])], lr=0.1, weight_decay=0.5, cautious=True)
        >>> weight
        tensor([0.8500, 1.1000])
    """
    on_device = isinstance(lr, Tensor) or isinstance(weight_decay, Tensor)
    if moving is None and not (cautious and (on_device or weight_decay)) and weights[0].dtype == updates[0].dtype:
        if isinstance(lr, Tensor):
            torch._foreach_mul_(weights, (1 - lr * weight_decay).to(weights[0].dtype))
            torch._foreach_sub_(weights, torch._foreach_mul(updates, lr.to(updates[0].dtype)))
            return
        if isinstance(weight_decay, Tensor):
            torch._foreach_mul_(weights, (1 - lr * weight_decay).to(weights[0].dtype))
        elif weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr)
        return
    for i, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        mask: Tensor | float = 1.0 if moving is None else moving[i]
        if cautious:
            mask = mask * decaying(weight, update)
        stepped = weight.to(update.dtype) * (1 - lr * weight_decay * mask) - lr * update
        if rounding is None:
            write(weight, stepped)
        else:
            rounding.write(weight, stepped, key=keys[i])
