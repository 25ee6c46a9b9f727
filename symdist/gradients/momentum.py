"""From gradients to the directions that rules transform: three kinds of momentum, applied to lists of local pieces."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from symdist.gradients.nonfinite import gated

State = Mapping[str, Tensor]

_FUSED = ("cpu", "cuda")
"""Devices for which PyTorch has a fused AdamW."""


def ema(
    states: Sequence[State], gradients: list[Tensor], *, momentum: float, gate: Tensor | None = None
) -> list[Tensor]:
    """Update an exponential moving average in place: `M ← β·M + (1−β)·G`. The direction is M.

    Args:
        states: The state of each parameter; "momentum" is M.
        gradients: G, in the shapes and dtype of the states.
        momentum: β.
        gate: 0-d, 1, or 0 to leave the state as it is, whatever the gradients are; None (default) for 1.

    Returns:
        The directions. They are the state tensors themselves, not copies.
    """
    buffers = [state["momentum"] for state in states]
    if gate is None:
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    else:
        torch._foreach_mul_(buffers, _factor(momentum, gate, buffers))
        torch._foreach_add_(buffers, gated(gradients, gate), alpha=1 - momentum)
    return buffers


def _factor(momentum: float, gate: Tensor, buffers: list[Tensor]) -> Tensor:
    """Return `momentum`, or 1 if the gate is 0, in the dtype of the buffers."""
    return torch.where(gate > 0, momentum, 1.0).to(buffers[0].dtype)


def heavy_ball(
    states: Sequence[State],
    gradients: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    gate: Tensor | None = None,
) -> list[Tensor]:
    """Update heavy-ball momentum in place: `B ← β·B + G`. The direction is B, or `G + β·B` with Nesterov.

    Args:
        states: The state of each parameter; "momentum" is B.
        gradients: G, in the shapes and dtype of the states.
        momentum: β.
        nesterov: Whether to use Nesterov momentum.
        gate: 0-d, 1, or 0 to leave the state as it is, whatever the gradients are; None (default) for 1.

    Returns:
        The directions. With Nesterov they are new tensors, otherwise the state tensors themselves.
    """
    buffers = [state["momentum"] for state in states]
    if gate is not None:
        gradients = gated(gradients, gate)
        torch._foreach_mul_(buffers, _factor(momentum, gate, buffers))
        torch._foreach_add_(buffers, gradients)
        if nesterov:
            torch._foreach_add_(gradients, buffers, alpha=momentum)
        return gradients if nesterov else buffers
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    return list(torch._foreach_add(gradients, buffers, alpha=momentum)) if nesterov else buffers


def adam(
    states: Sequence[State],
    gradients: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    gate: Tensor | None = None,
) -> list[Tensor]:
    """Update Adam's moments in place and return the bias-corrected direction `m̂/(√v̂ + eps)`.

    The direction equals what one AdamW step with learning rate 1 subtracts from a weight of zero.

    Args:
        states: The "exp_avg", "exp_avg_sq" and "step" of each parameter.
        gradients: The gradients, in the shapes and dtype of the states.
        betas: The decay rates of the first and the second moment.
        eps: The number added to `√v̂`.
        gate: 0-d, 1, or 0 to leave the state as it is, whatever the gradients are; None (default) for 1.

    Returns:
        The directions, as new tensors.
    """
    scratch = [torch.zeros_like(gradient) for gradient in gradients]
    adamw_step(scratch, states, gradients, betas=betas, eps=eps, lr=1.0, weight_decay=0.0, gate=gate)
    return list(torch._foreach_neg(scratch))


def adamw_step(
    weights: list[Tensor],
    states: Sequence[State],
    gradients: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    lr: float | Tensor,
    weight_decay: float,
    gate: Tensor | None = None,
) -> None:
    """Update weights in place with PyTorch's AdamW, which is fused on CPU and CUDA.

    AdamW treats every element independently, so the pieces may have any layout and strides.

    Args:
        weights: Local pieces of weights, all on one device; at least one.
        states: The "exp_avg", "exp_avg_sq" and "step" of each piece, updated in place.
        gradients: The gradients, in the shapes of `weights`; not written to.
        betas: The decay rates of the first and the second moment.
        eps: The number added to the denominator. Below √tiny, where squares vanish, it counts as that.
        lr: The learning rate, a number or 0-d on the device of the weights.
        weight_decay: The decoupled weight decay: a step subtracts `lr · weight_decay` times the weight.
        gate: 0-d float32, 1, or 0 to change nothing, whatever the gradients are; None (default) for 1.
    """
    device = weights[0].device.type
    fused = device in _FUSED
    if gate is not None and not fused:
        # Without a fused kernel, nothing but its host can stop AdamW.
        if not bool(gate):
            return
        gate = None
    # The fused kernels go through memory in order. On a slice, they would also update the memory between its rows. If a
    # gradient or moment has other strides than its weight, as where that is some rows of one stored column by column,
    # they would pair the wrong elements. Such tensors are copied first.
    originals = [weights, *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))]
    weights = [w if _dense(w) else torch.empty_like(w).copy_(w) for w in weights]
    gradients, first, second = (
        [
            tensor if tensor.stride() == weight.stride() else torch.empty_like(weight).copy_(tensor)
            for weight, tensor in zip(weights, tensors, strict=True)
        ]
        for tensors in (gradients, *originals[1:])
    )
    adamw(
        weights,
        gradients,
        first,
        second,
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=not fused,
        found_inf=None if gate is None else 1 - gate,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=max(eps, torch.finfo(weights[0].dtype).tiny ** 0.5),
        maximize=False,
    )
    for kept, stepped in zip(originals, (weights, first, second), strict=True):
        for original, tensor in zip(kept, stepped, strict=True):
            if original is not tensor:
                original.copy_(tensor)


def _dense(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor fill its memory without gaps, in any order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def advance(
    accumulator: str,
    states: Sequence[State],
    gradients: list[Tensor],
    options: Mapping[str, Any],
    gate: Tensor | None = None,
) -> list[Tensor]:
    """Update the momentum of pieces and return their directions.

    The directions may be the state tensors themselves, so the caller must not write to them.

    Args:
        accumulator: The kind of momentum: "ema", "heavy_ball" or "adam".
        states: The state of each piece, updated in place.
        gradients: The gradients, in the shapes and dtype of the states.
        options: The accumulator's options: "momentum" for "ema", "momentum" and "nesterov" for "heavy_ball", "betas"
            and "eps" for "adam".
        gate: 0-d, 1, or 0 to leave the state as it is, whatever the gradients are; None (default) for 1.

    Returns:
        One direction per piece; see `ema`, `heavy_ball` and `adam`.

    Example:
        >>> state, gradient = {"momentum": torch.zeros(3)}, torch.ones(3)
        >>> advance("heavy_ball", [state], [gradient], {"momentum": 0.9, "nesterov": False})
        [tensor([1., 1., 1.])]
    """
    if accumulator == "ema":
        return ema(states, gradients, momentum=options["momentum"], gate=gate)
    if accumulator == "heavy_ball":
        return heavy_ball(states, gradients, momentum=options["momentum"], nesterov=options["nesterov"], gate=gate)
    return adam(states, gradients, betas=options["betas"], eps=options["eps"], gate=gate)
