"""From gradients to what a rule transforms: momentum in its three forms, on lists of pieces."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = Mapping[str, Tensor]


def ema(states: Sequence[State], gradients: list[Tensor], *, momentum: float) -> list[Tensor]:
    """`M ← β·M + (1−β)·G`; the direction is M itself."""
    buffers = [state["momentum"] for state in states]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    return buffers


def heavy_ball(states: Sequence[State], gradients: list[Tensor], *, momentum: float, nesterov: bool) -> list[Tensor]:
    """`B ← β·B + G`; the direction is B, or `G + β·B`."""
    buffers = [state["momentum"] for state in states]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    return list(torch._foreach_add(gradients, buffers, alpha=momentum)) if nesterov else buffers


def adam(states: Sequence[State], gradients: list[Tensor], *, betas: tuple[float, float], eps: float) -> list[Tensor]:
    """The bias-corrected Adam direction `m̂/(√v̂ + eps)`: what AdamW would subtract from zero at lr 1."""
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
    """PyTorch's own AdamW, fused where it has a kernel, on pieces of any layout and strides: it is coordinate-wise."""
    device = weights[0].device.type
    # The fused kernels walk memory: what lies between the rows of a slice would be stepped too, and a gradient of other
    # strides than its weight's paired wrongly.
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
    """Whether the elements fill the memory from the first to the last, in whatever order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def advance(
    accumulator: str, states: Sequence[State], gradients: list[Tensor], options: Mapping[str, Any]
) -> list[Tensor]:
    """Take the gradients in and return the directions. Neither gradients nor directions may be written to after."""
    if accumulator == "ema":
        return ema(states, gradients, momentum=options["momentum"])
    if accumulator == "heavy_ball":
        return heavy_ball(states, gradients, momentum=options["momentum"], nesterov=options["nesterov"])
    return adam(states, gradients, betas=options["betas"], eps=options["eps"])
