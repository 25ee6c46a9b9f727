"""Tiny models of thirteen architectures, one layer of each kind, with what of them a forward pass does not reach."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
LENGTH = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 8}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

TINY: dict[str, dict[str, Any]] = {
    "llama4_text": {
        **{"num_hidden_layers": 2, "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 8},
        **{"moe_layers": [1], "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"]},
    },
    "deepseek_v32": {
        **(_MLA | {"q_lora_rank": 12, "n_routed_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2}),
        **{"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "n_group": 2, "topk_group": 1},
        **{"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2},
        "head_dim": 4,
    },
    "qwen3_next": {
        **(_LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 24, "num_hidden_layers": 2}),
        **{"layer_types": ["linear_attention", "full_attention"]},
    },
    "kimi_linear": {
        **(_MLA | {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 20, "num_hidden_layers": 2}),
        **{"mlp_layer_types": ["dense", "sparse"], "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_head_dim": 8, "linear_num_heads": 4, "head_dim": 4},
    },
    "nemotron_h": {
        **{"ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
        **{"n_routed_experts": 4, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 24},
    },
    "granitemoehybrid": {
        **(_MAMBA | {"num_local_experts": 4, "shared_intermediate_size": 24, "num_hidden_layers": 2}),
        **{"layer_types": ["linear_attention", "full_attention"]},
    },
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4, "laurel_rank": 4},
        **{
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4, "altup_num_inputs": 2},
    },
    "bamba": _MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "gpt2": {
        **{"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "gpt_neox": {"num_hidden_layers": 2},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 24, "num_hidden_layers": 2},
    "jamba": {
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
        **{"mamba_d_state": 4, "mamba_dt_rank": 6, "use_mamba_kernels": False},
    },
    "gpt_oss": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}

# Weights that no loss of the next token reaches, by model and pattern of their name, and why.
WITHOUT_GRADIENT: dict[str, dict[str, str]] = {
    "deepseek_v32": {"*.indexer.*": "an indexer only chooses which tokens attention sees; choosing has no gradient"},
}


def tiny(model_type: str) -> Any:
    """The model in float64, the same weights wherever it is built; norms, biases and vectors are drawn too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_COMMON | TINY[model_type]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64), alpha=0.05)
    return model.train()


def tokens(step: int, share: int) -> Tensor:
    """The tokens of a share of a step's batch: those of one rank."""
    generator = torch.Generator().manual_seed(100 * step + share)
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)


def backward(model: nn.Module, batch: Tensor) -> float:
    """Forward and backward on the next token; returns the loss."""
    logits = model(input_ids=batch, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return loss.item()
