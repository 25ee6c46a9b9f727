"""Preparation of gradients for a step: placed like their weights and, as all ranks agree, finite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.exchange import StepProgress, Transport
from symdist.gradients.nonfinite import Agreed, NonFinite, agree, bounded, limit_of, zeroed
from symdist.gradients.partial_sums import bring_home, in_doubt, sum_up
from symdist.layouts import Group, local
from symdist.param_specs import ParamSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Gradients that are ready for a step.

    Attributes:
        pieces: This rank's piece of every gradient, in the order of the parameters.
        agreed: What all ranks know of them; None if elements that are not finite were set to zero.
    """

    pieces: list[Tensor]
    agreed: Agreed | None


def ready_gradients(
    specs: Sequence[ParamSpec],
    *,
    nonfinite: NonFinite,
    expected: bool,
    peers: Group | None,
    transport: Transport,
    progress: StepProgress,
    read: bool,
) -> Gradients:
    """Collect this rank's piece of every gradient.

    All ranks of `peers` must call it.

    Args:
        specs: All parameters of the optimizer.
        nonfinite: "zero" to set elements that are inf or NaN to zero.
        expected: Whether to raise an error if no rank has any gradient, as in the first step.
        peers: The ranks that must agree; None if this rank trains alone.
        transport: The transport that runs the collectives.
        progress: A record of what the step is doing, for reports on a hung step; updated here.
        read: Whether numbers on the device may be read. If not, a rank relies on what it knows itself, wherever its
            gradients leave no doubt: a DTensor has the same placements on all its ranks.

    Returns:
        The gradients.

    Raises:
        ValueError: If a gradient cannot be used (see `gradient_of`) or cannot be redistributed to its weight's
            placements, or if no rank has a gradient although `expected` is set.
    """
    trainable = [(spec.name, spec.parameter) for spec in specs if spec.parameter.requires_grad]
    has_gradient = any(parameter.grad is not None for _, parameter in trainable)
    misplaced = {id(parameter) for _, parameter in bring_home(trainable)}
    present = [spec for spec in specs if id(spec.parameter) not in misplaced]
    pieces = [gradient_of(spec) for spec in present]
    limits = [_limit(spec, piece, read=read) for spec, piece in zip(present, pieces, strict=True)]
    device = specs[0].parameter.device if specs else torch.device("cpu")
    progress.before = "agreeing on whether gradients are finite"
    agreed = agree(
        pieces,
        limits,
        peers,
        elsewhere=bool(misplaced),
        has_gradient=has_gradient,
        transport=transport,
        read=read,
        device=device,
    )
    if expected and trainable and not has_gradient and not agreed.any:
        raise ValueError(
            "no parameter on any rank has a gradient in the first step. Either step() ran before backward(), or the "
            "optimizer was built for another model or before the model was sharded (fully_shard, prepare); build it "
            "after sharding, with symdist.build_optimizer(model, recipe)"
        )
    if bool(agreed.elsewhere) if read or in_doubt(parameter for _, parameter in trainable) else bool(misplaced):
        progress.before = "summing gradients whose placements differ from their weights'"
        sum_up(trainable, transport=transport, read=read)
        pieces = [gradient_of(spec) for spec in specs]
        limits = [_limit(spec, piece, read=read) for spec, piece in zip(specs, pieces, strict=True)]
        progress.before = "agreeing on whether gradients are finite"
        agreed = agree(
            pieces,
            limits,
            peers,
            elsewhere=False,
            has_gradient=has_gradient,
            transport=transport,
            read=read,
            device=device,
        )
    progress.before = ""
    if nonfinite == "zero":
        pieces = [zeroed(piece, limit) for piece, limit in zip(pieces, limits, strict=True)]
    if read:
        pieces = bounded(pieces, agreed.norms, [spec.rule.accumulator == "adam" for spec in specs])
    return Gradients(pieces=pieces, agreed=None if nonfinite == "zero" else agreed)


def _limit(spec: ParamSpec, gradient: Tensor, *, read: bool) -> float:
    """Return above which magnitude a gradient counts as not finite."""
    # Bounding every gradient of AdamW would take an accelerator half as long as its update.
    return limit_of(gradient.dtype, squared=not read and spec.rule.accumulator == "adam")


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
    placements, gradient_placements = getattr(spec.parameter, "placements", None), getattr(gradient, "placements", None)
    piece = local(gradient)
    if placements != gradient_placements or tuple(piece.shape) != spec.layout.local_shape:
        raise ValueError(
            f"{spec.name}: this rank's gradient has shape {tuple(piece.shape)} and placements {gradient_placements}, "
            f"its weight {spec.layout.local_shape} and {placements}; reduce the gradient and give it the placements of "
            "the weight before the step"
        )
    return piece
