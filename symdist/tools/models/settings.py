"""Checks the settings of a model, so that what is built can be trained: names, types, ranges, and what must fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Settings that transformers reads from a config although the config class has no such field, and their values. It
# would download other implementations, and run them.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_UNDECLARED_BY_FAMILY = {"qwen3-moe": {"head_dim"}}

# transformers checks types, but no ranges. What is not listed is a size, or a factor.
_SIZES = (1, 2**20)
_FACTORS = (1e-12, 1e9)
_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "num_hidden_layers": (1, 1000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_attention_heads"), (1, 2**14)),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), (1, 2**31)),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), (0, 2**24)),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "num_mtp_layers", "mlp_only_layers"), (0, 2**20)),
    "rope_theta": (1, 1e12),
    # The architectures here rotate whole heads.
    "partial_rotary_factor": (1, 1),
    "initializer_range": (1e-9, 100),
    "attention_dropout": (0, 0.99),
    "router_aux_loss_coef": (0, 1e3),
}


def configure(
    config_class: Any, family: str, settings: Mapping[str, Any], *, defaults: Mapping[str, Any], where: str
) -> Any:
    """Make a configuration of transformers from settings, and check each of them.

    Args:
        config_class: The class of the configuration.
        family: The name of the family.
        settings: The settings that the user gave.
        defaults: Settings that those replace.
        where: Where they come from; error messages start with it.

    Returns:
        The configuration.

    Raises:
        ValueError: If a setting is unknown, has the wrong type, or is out of range.
    """
    # Settings that all classes share are about downloaded models, and others would have no effect.
    shared = {field.name for base in config_class.__bases__ for field in dataclasses.fields(base)}
    known = {field.name for field in dataclasses.fields(config_class)} - shared
    known |= {*config_class.attribute_map, *_IMPLEMENTATIONS, *_UNDECLARED_BY_FAMILY.get(family, ())}
    # transformers accepts unknown settings silently, so a misspelt one would have no effect.
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{where}: transformers' {config_class.__name__} has no setting {', '.join(unknown)}; check the spelling"
        )
    aliases = {name: other for name, other in config_class.attribute_map.items() if name in settings}
    if twice := [name for name, other in aliases.items() if other in settings]:
        raise ValueError(f"{where}: {twice[0]} is another name of {aliases[twice[0]]}; give one of them")
    # It checks no type under another name.
    settings = {aliases.get(name, name): value for name, value in settings.items()}
    for name, choices in _IMPLEMENTATIONS.items():
        if name in settings and settings[name] not in choices:
            raise ValueError(f"{where}: {name}={settings[name]!r} is not one of {', '.join(choices)}")
    for name, value in settings.items():
        for key, number in _numbers(name, value):
            low, high = _RANGES.get(key, _SIZES if isinstance(number, int) else _FACTORS)
            if not low <= number <= high:
                raise ValueError(f"{where}: {name}={value!r} must be between {low:,} and {high:,}")
    try:
        config = config_class(**{**defaults, **settings})
    except Exception as error:  # transformers raises errors of any kind; each is about the settings.
        raise ValueError(f"{where}: {' '.join(str(error).split())}; correct the settings") from None
    return config


def check_fit(config: Any, *, dtype: torch.dtype, where: str) -> None:
    """Check that the settings of a configuration fit together.

    Args:
        config: The configuration.
        dtype: The dtype of the weights.
        where: Where its settings come from; error messages start with it.

    Raises:
        ValueError: If two settings do not fit; the message names both.
    """
    for problem in _misfits(config, dtype):
        raise ValueError(f"{where}: {problem}")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield all numbers of a setting, each with the nearest key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(name, item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _misfits(config: Any, dtype: torch.dtype) -> Iterator[str]:
    """Yield what does not fit together in a configuration."""

    def of(name: str) -> Any:
        return getattr(config, name, None)

    heads, shared, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    if of("kv_lora_rank") is not None:
        if shared != heads:
            yield f"num_key_value_heads={shared} must be num_attention_heads={heads} in latent attention"
        if config.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim={config.qk_rope_head_dim} must be even"
    else:
        if heads % shared:
            yield f"num_key_value_heads={shared} must divide num_attention_heads={heads}"
        if of("head_dim") is None and hidden % heads:
            yield f"num_attention_heads={heads} must divide hidden_size={hidden}"
        if (size := of("head_dim") or hidden // heads) % 2:
            yield f"the heads have {size} dimensions, but positions are encoded in pairs; give an even number"
    experts, chosen, groups = of("num_local_experts"), of("num_experts_per_tok"), of("n_group")
    if experts and not (chosen and chosen <= experts):
        yield f"num_experts_per_tok={chosen} must be between 1 and the number of experts, {experts}"
    width = of("moe_intermediate_size") or config.intermediate_size
    # Rows of grouped matrix products must start at multiples of 16 bytes.
    step = 16 // dtype.itemsize
    if experts and of("_experts_implementation") not in ("eager", "batched_mm") and (width % step or hidden % step):
        yield (
            f"hidden_size={hidden} and the experts' width of {width} must be multiples of {step} for grouped matrix "
            'products; or give experts_implementation = "eager"'
        )
    if groups:
        if experts % groups:
            yield f"n_group={groups} must divide the number of experts, {experts}"
        # A group is valued by its two best experts.
        if experts // groups < 2:
            yield f"n_group={groups} leaves fewer than two of {experts} experts in a group; give fewer"
        if not (kept := of("topk_group")) or kept > groups or kept * (experts // groups) < chosen:
            yield f"topk_group={kept} must be between 1 and n_group={groups}, with num_experts_per_tok={chosen} experts"
    kinds = set(of("layer_types") or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        yield f"layer_types has {', '.join(sorted(kinds))}; give full_attention and sliding_attention only"
    if "sliding_attention" in kinds and not of("sliding_window"):
        yield "layer_types has sliding_attention; give sliding_window, and use_sliding_window = true where there is one"
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = of(name) if isinstance(of(name), list) else [of(name)]
        if any(token is not None and token >= config.vocab_size for token in ids):
            yield f"{name}={of(name)} must be below vocab_size={config.vocab_size}"
