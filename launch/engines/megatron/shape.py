"""What of a model's preset a Megatron GPT can be: its sizes, and the families that have a counterpart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By transformers' name of a family: what it is called in a preset, and settings that a Megatron GPT has no part for,
# each with the value that leaves it out. gpt-oss has its own differences, told below.
_PLAIN: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", _PLAIN | {"clip_qkv": None}),
    "qwen3": ("qwen3", _PLAIN | {"use_sliding_window": False}),
    "qwen3_moe": ("qwen3-moe", _PLAIN | {"use_sliding_window": False}),
    "gpt_oss": ("gpt-oss", {"hidden_act": "silu", "attention_dropout": 0.0}),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder of grouped-query attention and SwiGLU, with experts in some or none of its layers.

    It is the preset's model except for these. OLMoE has one norm over all query heads together and one over all key
    heads; Megatron's norm is of each head. Of gpt-oss only the sizes are here: it has no sinks, no windows, no biases,
    no YaRN, and its experts are plain SwiGLU without clamping.
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
    """Standard deviation of the weights that are drawn."""
    tied: bool
    head_norms: bool
    """Whether queries and keys are normalized, head by head."""
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    normalized: bool = True
    """Whether the probabilities of the experts that a token goes to sum to 1."""
    moe_layers: tuple[bool, ...] = ()
    """Whether each layer has experts."""


def shape_of(config: Any) -> Shape:
    """The shape of a model of transformers, from its configuration.

    Raises ValueError for a family that has no counterpart here, naming those that have, and for a setting that has
    none.
    """
    if config.model_type not in _FAMILIES:
        known = ", ".join(name for name, _ in _FAMILIES.values())
        raise ValueError(
            f"family {config.model_type!r} has no counterpart in launch.pretrain_megatron; take a model of {known}, "
            "or train it with launch.pretrain"
        )
    family, plain = _FAMILIES[config.model_type]
    for name, value in plain.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, which the Megatron counterpart of {family} does not do; "
                f"leave it at {value!r}"
            )
    moe = _experts(config) if family != "qwen3" else {}
    rope: Mapping[str, Any] = config.rope_parameters
    if family != "gpt-oss" and rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}, which the Megatron counterpart of {family} does not do")
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
        # gpt-oss takes the softmax over those that were chosen.
        "normalized": getattr(config, "norm_topk_prob", True),
        "moe_layers": tuple(i not in dense and (i + 1) % every == 0 for i in range(config.num_hidden_layers)),
    }
