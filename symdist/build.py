"""Builds the optimizer of a model by a recipe."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from symdist.exchange import ExchangeLike, Transport
from symdist.gradients.nonfinite import NonFinite
from symdist.layouts.groups import Ranks
from symdist.optimizer import SymDist
from symdist.routing.recipes import RecipeLike
from symdist.routing.route import route


def build_optimizer(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    lr: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
    nonfinite: NonFinite = "raise",
    capturable: bool = False,
    exchange: ExchangeLike = None,
    process_group: Ranks | None = None,
    replicate_group: Ranks | None = None,
    transport: Transport | None = None,
) -> SymDist:
    """Build the optimizer of a model by a recipe: `SymDist(route(model, recipe, …), …)`. All ranks call it.

    Args:
        model: The model. It may be sharded already, or be sharded before the first step.
        recipe: A recipe's name (`symdist.recipe_names()`), a TOML file, or a mapping of the same form.
        lr: The learning rate of the matrices, to which all others stay in proportion. None (default) leaves the
            recipe's own.
        overrides: Options by role that replace the recipe's: `{"router": {"lr": 1e-3}}`. Learning rates in it are
            final: `lr` does not scale them.
        strict: Whether to refuse linear layers of which no more is known than that they are matrices; False by default.
        nonfinite: What all ranks do together if a gradient is inf or NaN: "raise" (default), "skip" or "zero".
        capturable: Whether steps are to be captured in a CUDA graph; see `SymDist`.
        exchange: How matrices travel between ranks, `ExchangeOptions` or a mapping of its keys.
        process_group: The ranks that must agree on gradients; see `SymDist`.
        replicate_group: The ranks that hold identical plain tensors; by default those of a
            `DistributedDataParallel`.
        transport: Replaces the collectives, to count them.

    Returns:
        The optimizer.

    Raises:
        ValueError: Naming the parameter and the remedy; see `route` and `SymDist`.

    Example:
        >>> opt = symdist.build_optimizer(model, "olmoe", lr=5e-3, overrides={"router": {"rule": "left_spectral"}})
    """
    if replicate_group is None and isinstance(model, DistributedDataParallel):
        replicate_group = model.process_group
    groups = route(model, recipe, lr=lr, overrides=overrides, strict=strict)
    if not groups:
        raise ValueError(
            "the model has no trainable parameters: pass the one that is to be trained, or thaw some of it"
        )
    return SymDist(
        groups,
        nonfinite=nonfinite,
        capturable=capturable,
        exchange=exchange,
        process_group=process_group,
        replicate_group=replicate_group,
        transport=transport,
        model=model,
    )
