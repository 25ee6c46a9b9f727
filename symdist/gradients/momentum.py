"""From gradients to the directions that rules transform: the three kinds of momentum, on lists of local pieces."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = Mapping[str, Tensor]


def ema(states: Sequence[State], gradients: list[Tensor], *, momentum: float) -> list[Tensor]:
    """Update an exponential moving average, `M ← β·M + (1−β)·G`, in place; the direction is M.

    Args:
        states: Each parameter's state; "momentum" is M.
        gradients: G, in the shapes and dtype of the states.
        momentum: β.

    Returns:
        The directions: the state tensors themselves, not copies.
    """
    buffers = [state["momentum"] for state in states]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    return buffers


def heavy_ball(states: Sequence[State], gradients: list[Tensor], *, momentum: float, nesterov: bool) -> list[Tensor]:
    """Update heavy-ball momentum, `B ← β·B + G`, in place; the direction is B, or `G + β·B` with Nesterov.

    Args:
        states: Each parameter's state; "momentum" is B.
        gradients: G, in the shapes and dtype of the states.
        momentum: β.
        nesterov: Whether to look ahead by one step.

    Returns:
        The directions: new tensors with Nesterov, else the state tensors themselves.
    """
    buffers = [state["momentum"] for state in states]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    return list(torch._foreach_add(gradients, buffers, alpha=momentum)) if nesterov else buffers


def adam(states: Sequence[State], gradients: list[Tensor], *, betas: tuple[float, float], eps: float) -> list[Tensor]:
    """Update Adam's moments and return the bias-corrected direction `m̂/(√v̂ + eps)`.

    It is what one AdamW step at lr 1 subtracts from a zero weight.

    Args:
        states: Each parameter's "exp_avg", "exp_avg_sq" and "step", updated in place.
        gradients: In the shapes and dtype of the states.
        betas: Decay rates of the first and the second moment.
        eps: Added to `√v̂`.

    Returns:
        The directions, new tensors.
    """
    scratch = [torch.zeros_like(gradient) for gradient in gradients]
    adamw_step(scratch, states, gradients, betas=betas, eps=eps, lr=1.0, weight_decay=0.0)
    return list(torch._foreach_neg(scratch))


def adamw_step(
    weights: list[Tensor],
    states: Sequence[State],
    gradients: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
) -> None:
    """Step weights in place by PyTorch's AdamW, fused on CPU and CUDA.

    AdamW is coordinate-wise, so pieces of any layout and strides will do.

    Args:
        weights: Local pieces, all on one device; at least one.
        states: Each piece's "exp_avg", "exp_avg_sq" and "step", updated in place.
        gradients: Of the shapes of `weights`; not written to.
        betas: Decay rates of the first and the second moment.
        eps: Added to the denominator.
        lr: The learning rate.
        weight_decay: Decoupled weight decay; a step takes `lr · weight_decay` of a weight away.
    """
    device = weights[0].device.type
    # The fused kernels walk memory in order. On a slice they would also step what lies between its rows, and they would
    # pair a weight with the wrong elements of a gradient that has other strides. So both are copied where they differ.
    given, weights = weights, [w if _dense(w) else torch.empty_like(w).copy_(w) for w in weights]
    gradients = [
        gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    adamw(
        weights,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=device in ("cpu", "cuda"),
        foreach=device not in ("cpu", "cuda"),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for weight, stepped in zip(given, weights, strict=True):
        if weight is not stepped:
            weight.copy_(stepped)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def advance(
    accumulator: str, states: Sequence[State], gradients: list[Tensor], options: Mapping[str, Any]
) -> list[Tensor]:
    """Update the momentum of pieces and return their directions.

    Directions may be the state tensors themselves, so the caller must not write to them.

    Args:
        accumulator: "ema", "heavy_ball" or "adam".
        states: Each piece's state, updated in place.
        gradients: Of the shapes and dtype of the states.
        options: The accumulator's options: "momentum", with heavy ball also "nesterov"; or "betas" and "eps".

    Returns:
        One direction per piece, see `ema`, `heavy_ball` and `adam`.
    """
    if accumulator == "ema":
        return ema(states, gradients, momentum=options["momentum"])
    if accumulator == "heavy_ball":
        return heavy_ball(states, gradients, momentum=options["momentum"], nesterov=options["nesterov"])
    return adam(states, gradients, betas=options["betas"], eps=options["eps"])
