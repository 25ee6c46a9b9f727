"""Options of the optimizer in Megatron, and the check for Megatron features that symdist does not support."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from symdist.exchange import ExchangeLike
from symdist.gradients.nonfinite import NonFinite
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `get_symdist_optimizer`, whose docstring explains them in full.

    Attributes:
        recipe: The recipe: a name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        overrides: Options by role that replace the recipe's. Empty by default.
        vocabulary: The number of real tokens. None (default) counts every row of embedding and head as one.
        nonfinite: What to do about gradients that are inf or NaN: "raise" (default), "skip" or "zero".
        exchange: Settings of the communication. None (default) leaves all at their defaults.
    """

    recipe: RecipeLike
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vocabulary: int | None = None
    nonfinite: NonFinite = "raise"
    exchange: ExchangeLike = None


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A recipe whose learning rates and weight decays are scaled to those of Megatron's config.

    Attributes:
        recipe: The scaled recipe, with overrides.
        lr: The learning rate of its matrices.
        weight_decay: The weight decay of its matrices.
    """

    recipe: Recipe
    lr: float
    weight_decay: float


def scaled(options: Options, config: Any) -> Scaled:
    """Load the recipe, scale it to `lr` and `weight_decay` of Megatron's config, and apply the overrides unscaled.

    Args:
        options: The options.
        config: Megatron's `OptimizerConfig`.

    Returns:
        The scaled recipe.

    Raises:
        ValueError: If the config's `lr` is not positive, or the config has a weight decay and the recipe decays no
            matrices. Also as `load_recipe` and `Recipe.overridden` do.
    """
    if config.lr is not None and not (math.isfinite(config.lr) and config.lr > 0):
        raise ValueError(
            f"symdist: lr={config.lr!r} of the optimizer config must be a positive number, or None for the recipe's"
        )
    recipe, lr = load_recipe(options.recipe).at_rate(config.lr)
    recipe_decay = float((recipe.options("matrix") or {}).get("weight_decay", 0.0))
    config_decay = float(config.weight_decay)
    if recipe_decay:
        recipe = recipe.multiplied("weight_decay", config_decay / recipe_decay)
    elif config_decay and "weight_decay" not in options.overrides.get("matrix", {}):
        raise ValueError(
            f"recipe {recipe.name!r} has no weight decay for its matrices, but Megatron's weight_decay is "
            f"{config_decay}; set that to 0 (--weight-decay 0), or give the matrices one as an override "
            "(--symdist-override matrix.weight_decay=0.1)"
        )
    return Scaled(recipe=recipe.overridden(options.overrides), lr=lr, weight_decay=config_decay)


def check_features(config: Any, chunks: Sequence[Any], *, layer_wise: bool) -> None:
    """Refuse Megatron features that symdist does not support.

    Args:
        config: Megatron's `OptimizerConfig`.
        chunks: The model chunks of this rank.
        layer_wise: Whether the layer-wise optimizer is used.

    Raises:
        ValueError: If any is in use. The message lists them, with a remedy where there is one.
    """
    ddp = getattr(chunks[0], "ddp_config", None)
    kind = type(chunks[0]).__name__
    unsupported = {
        f"a model that is no DistributedDataParallel of megatron-core but a {kind} (for torch FSDP2, use "
        "symdist.build_optimizer on the model itself)": ddp is None or "FullyShardedDataParallel" in kind,
        "Megatron-FSDP (use_megatron_fsdp; use the distributed optimizer)": getattr(ddp, "use_megatron_fsdp", False),
        "fp16, whose loss scale may skip a step on some ranks only (use bf16)": config.fp16,
        "weights stored in fp8 or fp4 (turn off fp8_param_gather, fp4_param_gather; computing in fp8 is fine)": (
            getattr(ddp, "fp8_param_gather", False) or getattr(ddp, "fp4_param_gather", False)
        ),
        "use_precision_aware_optimizer (turn it off)": config.use_precision_aware_optimizer,
        "optimizer_cpu_offload (turn it off)": config.optimizer_cpu_offload,
        "decoupled_lr (use the overrides embedding.lr=… and head.lr=… instead)": config.decoupled_lr is not None,
        "optimizer_cuda_graph (turn it off)": getattr(config, "optimizer_cuda_graph", False),
        "the layer-wise and the distributed optimizer together (choose one)": (
            layer_wise and bool(config.use_distributed_optimizer)
        ),
        "the layer-wise optimizer with overlap_param_gather (turn that off)": (
            layer_wise and bool(config.overlap_param_gather or getattr(ddp, "overlap_param_gather", False))
        ),
        "weight sharding by GTP or EGTP (leave out *gtp_weight_remat_size)": _shards_weights_further(chunks[0]),
    }
    used = [feature for feature, is_on in unsupported.items() if is_on]
    if used:
        raise ValueError(f"symdist does not support {'; '.join(used)}")
    by_chunk = [bool(chunk.ddp_config.use_distributed_optimizer) for chunk in chunks]
    if any(distributed != bool(config.use_distributed_optimizer) for distributed in by_chunk):
        raise ValueError(
            f"symdist: use_distributed_optimizer is {bool(config.use_distributed_optimizer)} in the optimizer's config "
            f"and {by_chunk[0]} in DistributedDataParallel's; set both to the same value"
        )


def _shards_weights_further(chunk: Any) -> bool:
    config = getattr(chunk, "config", None)
    sizes = ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
    return any((getattr(config, name, 1) or 1) > 1 for name in sizes)
