"""Every language model with experts that transformers can build, small enough for real forwards on a CPU."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What is not here keeps its default; what a config does not have is left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "max_position_embeddings", "max_seq_len"), 64),
    **dict.fromkeys(("hidden_size", "intermediate_size", "ffn_hidden_size", "d_model"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "index_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("index_topk", "sliding_window", "ssm_state_size", "mamba_d_state", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "mamba_dt_rank", "linear_num_heads"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "zero_expert_num", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "num_key_value_heads", "n_group"), 2),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "num_layers"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    "use_cache": False,
}
# Attention whose keys have the heads of the queries.
_LATENT = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "dots3_note_text", "glm4_moe_lite"),
    *("glm_moe_dsa", "kimi_linear", "longcat_flash", "sarvam_mla"),
)
_OWN: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in _LATENT},
    "dots1": {"moe_intermediate_size": 16, "n_shared_experts": 1, "num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "use_sliding_window": False},
    "gemma4_text": {
        **{"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 64},
        "hidden_size_per_layer_input": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Built neither by default nor by sizes alone, without experts, or with the layers of their text models.
_LEFT_OUT = ("dbrx", "doge", "dots3_note", "gemma4", "qwen4_exp", "qwen4_exp_text")


def families() -> list[str]:
    """The model types of all causal language models whose configs speak of experts."""
    known = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _speaks_of_experts(CONFIG_MAPPING[family])]
    return [family for family in known if family not in _LEFT_OUT]


def _speaks_of_experts(config_class: Any) -> bool:
    text = config_class.sub_configs.get("text_config")
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    experts = any("expert" in name or name == "ffn_config" for name in names)
    return experts or (dataclasses.is_dataclass(text) and _speaks_of_experts(text))


def config(family: str) -> Any:
    """A configuration of the family with small sizes."""
    return CONFIG_MAPPING[family](**_settings(CONFIG_MAPPING[family], family))


def _settings(config_class: Any, family: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    settings = {name: value for name, value in _SIZES.items() if name in names} | _OWN.get(family, {})
    for alias, name in config_class.attribute_map.items():
        if alias in settings and name in settings:
            del settings[alias]
    text = config_class.sub_configs.get("text_config")
    if dataclasses.is_dataclass(text):
        settings["text_config"] = _settings(text, f"{family}_text")
    return settings


def build(family: str, seed: int = 0) -> Any:
    """A model of the family with small sizes and random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family))
