"""The sizes of a model as a Megatron GPT, and which model families have such a counterpart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By transformers' name of a family: its name in presets, and the settings that a Megatron GPT does not support, each
# with the value that turns it off. For gpt-oss see also `Shape`.
_PLAIN: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", _PLAIN | {"clip_qkv": None}),
    "qwen3": ("qwen3", _PLAIN | {"use_sliding_window": False}),
    "qwen3_moe": ("qwen3-moe", _PLAIN | {"use_sliding_window": False}),
    "gpt_oss": ("gpt-oss", {"hidden_act": "silu", "attention_dropout": 0.0}),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder with grouped-query attention and SwiGLU, with experts in all, some or none of its layers.

    The Megatron model is the preset's model with two exceptions. OLMoE has one norm over all query heads together and
    one over all key heads, while Megatron normalizes each head. Of gpt-oss only the sizes are kept: there are no sinks,
    sliding windows, biases or YaRN, and the experts are plain SwiGLU without clamping.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    theta: int
    epsilon: float
    deviation: float
    """Standard deviation of the initial weights."""
    tied: bool
    head_norms: bool
    """Whether queries and keys are normalized, each head on its own."""
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    normalized: bool = True
    """Whether the weights of a token's chosen experts sum to 1."""
    moe_layers: tuple[bool, ...] = ()
    """Whether each layer has experts."""


def shape_of(config: Any) -> Shape:
    """Return the shape of a transformers model.

    Args:
        config: The model's transformers configuration.

    Raises:
        ValueError: If the model's family, or one of its settings, has no counterpart in Megatron.
    """
    if config.model_type not in _FAMILIES:
        known = ", ".join(name for name, _ in _FAMILIES.values())
        raise ValueError(
            f"launch.pretrain_megatron does not support the model family {config.model_type!r}, only {known}; choose "
            "such a model, or train this one with launch.pretrain"
        )
    family, plain = _FAMILIES[config.model_type]
    for name, value in plain.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, which {family} under Megatron does not support; set it to "
                f"{value!r}, or train with launch.pretrain"
            )
    moe = _experts(config) if family != "qwen3" else {}
    rope: Mapping[str, Any] = config.rope_parameters
    if family != "gpt-oss" and rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}, which {family} under Megatron does not support; set it to 'default', "
            "or train with launch.pretrain"
        )
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        theta=int(rope["rope_theta"]),
        epsilon=config.rms_norm_eps,
        deviation=config.initializer_range,
        tied=config.tie_word_embeddings,
        head_norms=family != "gpt-oss",
        **moe,
    )


def _experts(config: Any) -> dict[str, Any]:
    every = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    return {
        "experts": getattr(config, "num_local_experts", None) or config.num_experts,
        "top_k": config.num_experts_per_tok,
        "expert_ffn": getattr(config, "moe_intermediate_size", config.intermediate_size),
        # gpt-oss has no such setting: it takes the softmax over the chosen experts.
        "normalized": getattr(config, "norm_topk_prob", True),
        "moe_layers": tuple(i not in dense and (i + 1) % every == 0 for i in range(config.num_hidden_layers)),
    }
