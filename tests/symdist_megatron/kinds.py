"""Kinds of Megatron models besides GPT's own: their configuration, their modules, and what it says of their weights.

Imported by `models` alone, after the stand-ins that Megatron needs.
"""

import copy
import dataclasses
import importlib.util
from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from tests.symdist_megatron.how import SEQUENCE, How

absorbed_mla: Any = None
if importlib.util.find_spec("megatron.core.transformer.experimental_attention_variant.absorbed_mla"):
    from megatron.core.transformer.experimental_attention_variant import absorbed_mla

    absorbed_mla.Linear = Linear
if importlib.util.find_spec("megatron.core.models.hybrid"):
    from megatron.core.models.hybrid import hybrid_block as blocks
    from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as StackSubmodules
else:
    from megatron.core.ssm import mamba_block as blocks
    from megatron.core.ssm.mamba_block import MambaStack as Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as StackSubmodules

# Without Transformer Engine it has mocks of its modules, which it takes for the real ones, or none.
multi_latent_attention.HAVE_TE = False
multi_latent_attention.Linear = Linear

_LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 4,
    "rope_type": "rope",
    "moe_shared_expert_gate": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "latent": _LATENT,
    # With the projections down in one weight.
    "joint": _LATENT,
    # With the indexer of sparse attention.
    "sparse": _LATENT
    | {
        "experimental_attention_variant": "dsa",
        "dsa_indexer_n_heads": 6,
        "dsa_indexer_head_dim": 4,
        "dsa_indexer_topk": 4,
    },
    "delta": {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "attention_output_gate": True,
        "softmax_type": "learnable",
    },
    "mamba": {"mamba_state_dim": 3, "mamba_head_dim": 4, "mamba_num_groups": 2},
}
PATTERN = "M*ME"
_LATENTS = ("latent", "joint", "sparse")
Config = TransformerConfig | MLATransformerConfig


class WholeLinear(Linear):
    """Of which every rank has all, like Transformer Engine's with this mode."""

    def __init__(self, *args: Any, parallel_mode: str = "duplicated", **kwargs: Any):
        assert parallel_mode == "duplicated"
        super().__init__(*args, **kwargs)


class PlainAttention(nn.Module):
    """In place of Transformer Engine's: Megatron's own is only for keys and values of one size."""

    def __init__(self, *, softmax_scale: float, **_: Any):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Of `[token, batch, head, size]`."""
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return found.permute(2, 0, 1, 3).flatten(2)


def config_class(how: How) -> type[Config]:
    return MLATransformerConfig if how.kind in _LATENTS else TransformerConfig


def model_of(config: Any, how: How, *, first: bool, last: bool) -> Any:
    common = {
        "vocab_size": how.vocabulary,
        "pre_process": first,
        "post_process": last,
        "share_embeddings_and_output_weights": how.tied,
    }
    if how.kind == "mamba":
        return _mamba(config, common, how)
    # Since 0.17 it refuses variants.
    plain = copy.copy(config)
    plain.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(plain, use_transformer_engine=False)
    # Some of them are the same one.
    block.layer_specs = [copy.deepcopy(layer) for layer in block.layer_specs]
    for i, layer in enumerate(block.layer_specs):
        if how.kind in _LATENTS:
            _latent(layer.submodules.self_attention, how.kind)
        elif how.kind == "delta" and not i:
            layer.submodules.self_attention = ModuleSpec(
                module=GatedDeltaNet,
                submodules=GatedDeltaNetSubmodules(
                    in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
                ),
            )
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if how.mtp else None
    return GPTModel(
        config, block, max_sequence_length=SEQUENCE, position_embedding_type="rope", mtp_block_spec=mtp, **common
    )


def _latent(spec: Any, kind: str) -> None:
    """One projection down cut, as in Megatron's modules, the other whole on all ranks, as in Transformer Engine's.

    Where this one is cut, Megatron does not sum the gradients of rotary keys over the ranks.
    """
    attention = spec.submodules
    attention.linear_kv_down_proj = Linear
    attention.core_attention = PlainAttention
    if kind == "joint":
        spec.module = multi_latent_attention.FusedMLASelfAttention
        attention.linear_qkv_down_proj = ColumnParallelLinear
    elif kind == "sparse":
        attention.core_attention = ModuleSpec(
            module=dsa.DSAttention,
            submodules=dsa.DSAttentionSubmodules(
                indexer=ModuleSpec(
                    module=dsa.DSAIndexer,
                    submodules=dsa.DSAIndexerSubmodules(
                        linear_wq_b=WholeLinear,
                        linear_wk=WholeLinear,
                        k_norm=WrappedTorchNorm,
                        linear_weights_proj=WholeLinear,
                    ),
                )
            ),
        )
        if absorbed_mla is not None:
            # The same with other products of its matrices, of which some versions store keys and values apart.
            spec.module, submodules = (
                absorbed_mla.AbsorbedMLASelfAttention,
                absorbed_mla.AbsorbedMLASelfAttentionSubmodules,
            )
            names = [each.name for each in dataclasses.fields(submodules)]
            spec.submodules = submodules(**{name: getattr(attention, name, ColumnParallelLinear) for name in names})


def _mamba(config: Any, common: dict[str, Any], how: How) -> Any:
    """A hybrid stack of Megatron's own modules, in place of Transformer Engine's."""
    blocks.TENorm = WrappedTorchNorm
    attention, experts = (
        get_gpt_layer_local_spec(num_experts, qk_layernorm=True, normalization="RMSNorm").submodules
        for num_experts in (None, how.experts)
    )
    stack = ModuleSpec(
        module=Stack,
        submodules=StackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=WrappedTorchNorm,
                    mixer=ModuleSpec(
                        module=MambaMixer,
                        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                    ),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=WrappedTorchNorm,
                    self_attention=attention.self_attention,
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=WrappedTorchNorm, mlp=experts.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
    pattern = {"hybrid_override_pattern": PATTERN}
    if "hybrid" in Stack.__module__:
        pattern = {"hybrid_layer_pattern": _cut(PATTERN, how.pp)}
    return MambaModel(
        config,
        mamba_stack_spec=stack,
        max_sequence_length=SEQUENCE,
        position_embedding_type="learned_absolute",
        **pattern,
        **common,
    )


def _cut(pattern: str, stages: int) -> str:
    size = len(pattern) // stages
    return "|".join(pattern[i : i + size] for i in range(0, len(pattern), size))


def rows(name: str, config: Any) -> list[tuple[int, int]] | None:
    """Of a weight of a mixer that tensor parallelism cuts section by section: the rows and the heads of each."""
    if ".mixer." in name:
        inner, states = 2 * config.hidden_size, config.mamba_num_groups * config.mamba_state_dim
        heads, groups = inner // config.mamba_head_dim, config.mamba_num_groups
        if "in_proj" in name:
            return [(inner, heads), (inner, heads), (states, groups), (states, groups), (heads, 1)]
        return [(inner, heads), (states, groups), (states, groups)] if "conv1d" in name else None
    if getattr(config, "linear_num_key_heads", None) and config.experimental_attention_variant == "gated_delta_net":
        key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
        keys, values = key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
        if "in_proj" in name:
            return [
                (keys, key_heads),
                (keys, key_heads),
                (values, heads),
                (values, heads),
                (heads, heads),
                (heads, heads),
            ]
        if "conv1d" in name:
            return [(keys, key_heads), (keys, key_heads), (values, heads)]
    return None
