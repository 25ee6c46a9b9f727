"""The `"params"` of a DeepSpeed config, and the check for DeepSpeed features that symdist does not support."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from symdist.exchange import ExchangeOptions
from symdist.routing.recipes import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """The `"params"` of `"type": "SymDist"` in a DeepSpeed config.

    Attributes:
        recipe: The recipe's name, the path of a TOML file, or a mapping of the same form. Required.
        lr: The learning rate of the recipe's matrices, above 0; all other rates keep their proportion to it. None
            (default) keeps the recipe's rates.
        overrides: Options by role that replace the recipe's, such as `{"router": {"rule": "left_spectral"}}`. `lr` does
            not scale learning rates given here. Empty by default.
        nonfinite: What all ranks do if a gradient on any rank is inf or NaN: "raise" (default) FloatingPointError
            before anything changes, "skip" the step, or set the offending elements to "zero".
        exchange: Settings of the communication, with the keys of `symdist.ExchangeOptions`. Its defaults if empty.
    """

    recipe: Any
    lr: float | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nonfinite: str = "raise"
    exchange: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> "Options":
        """Read and check the params of a config.

        Args:
            params: The `"params"` as DeepSpeed parsed them from JSON.

        Returns:
            The options.

        Raises:
            ValueError: If there is no recipe, an option is unknown, or `lr`, `overrides` or `exchange` has an invalid
                value.
        """
        values = dict(params or {})
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"optimizer SymDist knows no option {', '.join(map(repr, unknown))}; it knows {', '.join(known)}. "
                'Set an option of a rule by the role of its parameters: "overrides": {"other": {"weight_decay": 0.1}}'
            )
        if "recipe" not in values:
            raise ValueError(
                'optimizer SymDist needs a recipe; name one in the DeepSpeed config: "params": {"recipe": "olmoe"}'
            )
        options = cls(**values)
        lr = options.lr
        if lr is not None and (isinstance(lr, bool | str) or not (math.isfinite(lr) and lr > 0)):
            raise ValueError(f"optimizer SymDist: lr={lr!r} must be a positive number")
        if not isinstance(options.overrides, Mapping):
            raise ValueError(
                f"optimizer SymDist: overrides={options.overrides!r} must map roles to options, such as "
                '{"router": {"lr": 0.1}}'
            )
        try:
            ExchangeOptions.of(options.exchange)
        except ValueError as error:
            raise ValueError(f"optimizer SymDist: {error}") from None
        return options

    def scaled(self) -> tuple[Recipe, float]:
        """Load the recipe, scale its learning rates to `lr`, and apply the overrides.

        Returns:
            The recipe, and the learning rate of its matrices.

        Raises:
            ValueError: As `load_recipe` and `Recipe.overridden` do.
        """
        recipe = load_recipe(_tuples(self.recipe) if isinstance(self.recipe, Mapping) else self.recipe)
        recipe, base = recipe.at_rate(self.lr)
        return recipe.overridden(_tuples(self.overrides)), base


def _tuples(options: Any) -> Any:
    """Convert lists under the key `betas` to tuples, which JSON does not have."""
    if isinstance(options, Mapping):
        return {
            key: tuple(value) if key == "betas" and isinstance(value, list) else _tuples(value)
            for key, value in options.items()
        }
    return [_tuples(value) for value in options] if isinstance(options, list) else options


def check_features(engine: Any) -> None:
    """Refuse DeepSpeed features that symdist does not support.

    Args:
        engine: The DeepSpeed engine.

    Raises:
        ValueError: If the config uses any. The message lists them, with a remedy where there is one.
    """
    stage = int(engine.zero_optimization_stage())
    config = engine._config
    zero = config.zero_config

    def of_nvme(section: Any) -> bool:
        return section is not None and str(getattr(section, "device", "")).rpartition(".")[2] == "nvme"

    features = {
        "offload_optimizer to NVMe (a step needs all state in memory; offload to the CPU)": of_nvme(
            zero.offload_optimizer
        ),
        "offload_param to NVMe (offload to the CPU)": of_nvme(zero.offload_param),
        "offload_optimizer with ratio below 1": getattr(zero.offload_optimizer, "ratio", 1.0) < 1.0,
        "super_offload": bool(getattr(zero.offload_optimizer, "super_offload", False)),
        "zenflow": getattr(zero, "zenflow", None) is not None,
        "pipeline parallelism (PipelineModule)": bool(getattr(engine, "pipeline_parallelism", False)),
        "MiCS (mics_shard_size)": getattr(zero, "mics_shard_size", -1) > 0,
        "fp16 master weights": bool(engine.fp16_master_weights_and_gradients()),
        "bf16 master weights": bool(getattr(engine, "bf16_master_weights_and_gradients", bool)()),
        "sparse_gradients": bool(getattr(config, "sparse_gradients_enabled", False)),
        "elastic_checkpoint (convert to a universal checkpoint instead)": bool(zero.elastic_checkpoint),
        "torch_autocast in float16, whose scaler may skip a step on some ranks only (use bfloat16)": (
            bool(getattr(engine, "torch_autocast_enabled", bool)()) and engine.torch_autocast_dtype() == torch.float16
        ),
    }
    unsupported = [feature for feature, on in features.items() if on]
    if unsupported:
        raise ValueError(
            f"this DeepSpeed config uses what symdist does not support at ZeRO stage {stage}: {'; '.join(unsupported)}"
        )
