"""Decoupled weight decay, of all weights or of those alone that their update takes towards zero."""

from __future__ import annotations

import torch
from torch import Tensor


def decaying(weight: Tensor, update: Tensor) -> Tensor:
    """1 where subtracting the update does not take a weight away from zero, else 0.

    Source: cautious weight decay, arXiv 2510.12402, which decays these alone.
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
    """`W ← (1 − lr·weight_decay·c)·W − lr·U` in place, by the update's precision, however narrow the weights are.

    Args:
        weights: This rank's pieces of the weights, in any dtype and strides.
        updates: Pieces of the same shapes, at least as precise.
        lr: The learning rate.
        weight_decay: Decay per step, as a share of the weight over `lr`.
        cautious: Whether c is 1 only where the update goes towards zero; else it is 1 everywhere.
        moving: Where given, 1 for each element that may move, decay included, and 0 for each that may not.
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
