"""From a model and a recipe to its optimizer."""

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
    nonfinite: NonFinite = "raise",
    exchange: ExchangeLike = None,
    process_group: Ranks | None = None,
    replicate_group: Ranks | None = None,
    transport: Transport | None = None,
) -> SymDist:
    """The optimizer of a model by a recipe: `SymDist(route(model, recipe, …), …)`. All ranks call it.

    Args:
        model: The model, sharded already, or to be sharded before the first step: its shards are then taken over.
        recipe: A recipe's name (`symdist.recipe_names()`), a TOML file, or a mapping of the same form.
        lr: The learning rate of the matrices; all others follow in proportion. None leaves the recipe's own.
        overrides: Options of roles in place of the recipe's, rates as they stand: `{"router": {"lr": 1e-3}}`.
        nonfinite: What all ranks do together about a gradient that is inf or NaN: "raise", "skip" or "zero".
        exchange: How matrices travel between ranks, `ExchangeOptions` or a mapping of its keys.
        process_group: The ranks that must agree on gradients; see `SymDist`.
        replicate_group: The ranks on which plain tensors are the same; those of a `DistributedDataParallel` unless
            given.
        transport: Replaces the collectives, to count them.

    Raises:
        ValueError: As `route` and `SymDist` do, with the parameter's name and what to do.

    Example:
        >>> opt = symdist.build_optimizer(model, "olmoe", lr=5e-3, overrides={"router": {"rule": "left_spectral"}})
    """
    if replicate_group is None and isinstance(model, DistributedDataParallel):
        replicate_group = model.process_group
    return SymDist(
        route(model, recipe, lr=lr, overrides=overrides),
        nonfinite=nonfinite,
        exchange=exchange,
        process_group=process_group,
        replicate_group=replicate_group,
        transport=transport,
        model=model,
    )
