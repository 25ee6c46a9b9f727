"""Preparation of gradients for a step: placed like their weights and, as all ranks agree, finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.exchange import StepProgress, Transport
from symdist.gradients.nonfinite import NonFinite, agree, not_finite_error, zeroed
from symdist.gradients.partial_sums import bring_home, sum_up
from symdist.layouts import Group, local
from symdist.param_groups import ParamSpec


def ready_gradients(
    specs: Sequence[ParamSpec],
    *,
    nonfinite: NonFinite,
    expected: bool,
    peers: Group | None,
    transport: Transport,
    progress: StepProgress,
) -> list[Tensor] | None:
    """Collect this rank's piece of every gradient.

    All ranks of `peers` must call it.

    Args:
        specs: All parameters of the optimizer.
        nonfinite: What to do if a gradient is inf or NaN on any rank: "raise" an error, "skip" the step, or set those
            elements to "zero".
        expected: Whether to raise an error if no rank has any gradient, as in the first step.
        peers: The ranks that must agree; None if this rank trains alone.
        transport: The transport that runs the collectives.
        progress: A record of what the step is doing, for reports on a hung step; updated here.

    Returns:
        The local gradients in the order of `specs`, or None if the step is to be skipped.

    Raises:
        FloatingPointError: On all ranks, if a gradient is not finite on any rank and `nonfinite` is "raise".
        ValueError: If a gradient cannot be used (see `gradient_of`) or cannot be redistributed to its weight's
            placements, or if no rank has a gradient although `expected` is set.
    """
    moving = [(spec.name, spec.parameter) for spec in specs if spec.parameter.requires_grad]
    some = any(parameter.grad is not None for _, parameter in moving)
    away = {id(parameter) for _, parameter in bring_home(moving)}
    gradients = [gradient_of(spec) for spec in specs if id(spec.parameter) not in away]
    progress.before = "agreeing on whether gradients are finite"
    agreed = agree(gradients, peers, elsewhere=bool(away), some=some, transport=transport)
    if expected and not agreed.any and moving:
        raise ValueError(
            "no parameter of any rank has a gradient in the first step: was the optimizer built before the model "
            "was sharded (fully_shard, prepare), or of another model? Build it afterwards, with "
            "symdist.build_optimizer(model, recipe)"
        )
    if agreed.elsewhere:
        progress.before = "putting together gradients that lie otherwise than their weights"
        sum_up(moving, transport=transport)
        gradients = [gradient_of(spec) for spec in specs]
        progress.before = "agreeing on whether gradients are finite"
        agreed = agree(gradients, peers, elsewhere=False, some=some, transport=transport)
    progress.before = ""
    if nonfinite == "zero":
        return [zeroed(gradient) for gradient in gradients]
    if not agreed.finite and nonfinite == "raise":
        raise not_finite_error(gradients, [spec.name for spec in specs])
    return gradients if agreed.finite else None


def gradient_of(spec: ParamSpec) -> Tensor:
    """Return this rank's piece of a parameter's gradient.

    Args:
        spec: The parameter.

    Returns:
        The local gradient; zeros if the parameter has no gradient or is frozen.

    Raises:
        ValueError: Naming the parameter, if the gradient is sparse or is placed differently from the weight.
    """
    gradient = spec.parameter.grad
    if gradient is None or not spec.parameter.requires_grad:
        return torch.zeros_like(local(spec.parameter))
    if gradient.is_sparse:
        raise ValueError(f"{spec.name} has a sparse gradient; build its embedding with sparse=False")
    mine, theirs = getattr(spec.parameter, "placements", None), getattr(gradient, "placements", None)
    here = local(gradient)
    if mine != theirs or tuple(here.shape) != spec.layout.local_shape:
        raise ValueError(
            f"{spec.name}: this rank's gradient has shape {tuple(here.shape)} and placements {theirs}, its weight "
            f"{spec.layout.local_shape} and {mine}; gradients must be reduced and placed like their weights before "
            "the step"
        )
    return here
