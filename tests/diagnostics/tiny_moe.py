"""Every language model with experts that transformers can build, small enough for real forwards on a CPU."""

import dataclasses
import warnings
from typing import Any

import transformers
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
    "gemma4_text": {
        **{"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 64},
        "hidden_size_per_layer_input": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Their config classes do not build by default, or only at sizes that no test needs.
_BROKEN = ("dbrx", "qwen4_exp", "qwen4_exp_text")


def default_config(family: str) -> Any:
    """The default configuration of a family, or None if transformers' own defaults do not build."""
    return CONFIG_MAPPING[family]()
