"""Decoupled weight decay, of all weights or (cautious) only of those that their update does not move away from zero."""

from __future__ import annotations

import torch
from torch import Tensor


def decaying(weight: Tensor, update: Tensor) -> Tensor:
    """Return 1 where subtracting the update does not move a weight away from zero, else 0.

    Source: cautious weight decay (arXiv 2510.12402), which decays only those.

    Args:
        weight: A tensor of any shape.
        update: Of the same shape; the mask has its dtype.
    """
    return (weight * update >= 0).to(update.dtype)


def decay_and_subtract(
    weights: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    cautious: bool,
    moving: list[Tensor] | None = None,
) -> None:
    """Decay the weights and subtract the updates: `W ← (1 − lr·weight_decay·c)·W − lr·U` in place.

    The arithmetic has the updates' dtype, even if the weights are narrower.

    Args:
        weights: This rank's pieces of the weights, in any dtype and strides; at least one.
        updates: Pieces of the same shapes, in the same or a wider dtype.
        lr: The learning rate.
        weight_decay: The decay; a step takes `lr · weight_decay` of a weight away.
        cautious: Whether c is 1 only where the update does not move the weight away from zero (see `decaying`), and
            else 0. If False, c is 1 everywhere.
        moving: 1 where an element may move and 0 where it may not decay (its update is 0 already). None, the default,
            if all may.
    """
    if moving is None and not (cautious and weight_decay) and weights[0].dtype == updates[0].dtype:
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr)
        return
    for i, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        share: Tensor | float = 1.0 if moving is None else moving[i]
        if cautious:
            share = share * decaying(weight, update)
        weight.copy_(weight.to(update.dtype) * (1 - lr * weight_decay * share) - lr * update)
