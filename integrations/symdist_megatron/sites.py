"""Find out what each parameter of a Megatron model is used for, from its modules and their configuration."""

from itertools import pairwise
from typing import Any

from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import attention, mlp
from megatron.core.transformer.moe import experts, router
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import nn

from symdist.routing.evidence import site_of
from symdist.routing.facts import ModuleChain
from symdist.routing.param_site import ParamSite
from symdist.routing.words import norm_role

# megatron-core 0.17 removed GroupedMLP.
_EXPERTS = tuple(
    getattr(experts, name) for name in ("GroupedMLP", "TEGroupedMLP", "SequentialMLP") if hasattr(experts, name)
)


def global_name(leaf: str, chain: ModuleChain, *, expert_rank: int) -> str:
    """Return a parameter's name under every parallel layout: its layer and expert are numbered in the whole model."""
    words = []
    for (holder_name, holder), (word, module) in pairwise(chain):
        if holder_name == "layers" and isinstance(getattr(module, "layer_number", None), int):
            word = str(module.layer_number - 1)  # type: ignore[operator]
        elif holder_name == "local_experts":
            word = str(expert_rank * len(holder._modules) + int(word))
        words.append(word)
    return ".".join([*words, leaf])


def in_experts(chain: ModuleChain) -> bool:
    """Return whether modules include those of experts."""
    return any(isinstance(module, _EXPERTS) for _, module in chain)


def stacks_experts(module: nn.Module) -> bool:
    """Return whether a module stores all its experts in two weights, as `[expert, in, out]`."""
    return type(module).__name__ == "GroupedMLP" and isinstance(module, _EXPERTS)


def is_vocabulary(chain: ModuleChain) -> bool:
    """Return whether the rows of a weight, given the modules around it, are tokens."""
    attribute, module = chain[-1]
    return isinstance(module, VocabParallelEmbedding) or attribute == "output_layer"


def megatron_site(leaf: str, parameter: nn.Parameter, chain: ModuleChain) -> ParamSite:
    """Return the site of a parameter that its module holds as `leaf`; a matrix of unknown use has role None."""
    attribute, module = chain[-1]
    parent: Any = chain[-2][1] if len(chain) > 1 else module
    if parameter.dim() < 2 and "norm" in leaf:
        # The norm is fused with the linear layer that follows it.
        return ParamSite(role=norm_role(leaf, module))
    if parameter.dim() < 2 or leaf.startswith("bias") or isinstance(module, router.Router):
        # Grouped linear layers name their biases bias0, bias1, ….
        return site_of(leaf.rstrip("0123456789"), tuple(parameter.shape), chain)
    if is_vocabulary(chain) or type(module) is nn.Embedding:
        shared = any(getattr(holder, "share_embeddings_and_output_weights", False) for _, holder in chain)
        if shared and attribute in ("word_embeddings", "output_layer"):
            return ParamSite(role="tied_embedding")
        return ParamSite(role="head" if attribute == "output_layer" else "embedding")
    if isinstance(parent, attention.Attention):
        return _attention_site(attribute, parent)
    if stacks_experts(module):
        return _mlp_site(leaf == "weight1", module, "expert", transposed=True)
    if attribute in ("linear_fc1", "linear_fc2") and isinstance(parent, (mlp.MLP, *_EXPERTS)):
        return _mlp_site(attribute == "linear_fc1", parent, "expert" if in_experts(chain) else "mlp")
    # A shared expert's gate has a single row.
    return ParamSite(role="other" if leaf == "gate_weight" else None)


def sections_of(site: ParamSite, length: int, chain: ModuleChain) -> dict[str, tuple[int, ParamSite]]:
    """Return the sections of a fused weight, which together repeat `site.groups or site.blocks` times.

    Args:
        site: The weight's site.
        length: The size on each rank of the dimension along which the sections lie.
        chain: The modules around the weight.

    Returns:
        By the name of each section, in order, its size in one period and its site; empty if the weight is not fused.
    """
    if site.fused is not None:
        kind = str(site.role).partition("_")[0]
        sites = {name: ParamSite(role=f"{kind}_{name}", transposed=site.transposed) for name in ("gate", "up")}
        return {name: (length // 2, section) for name, section in sites.items()}
    if site.groups is None:
        return {}
    config: Any = chain[-2][1].config
    roles = {"q": "attention_q", "gate": "attention_q", "k": "attention_k", "v": "attention_v"}
    return {
        name: (heads * config.kv_channels, ParamSite(role=roles[name], heads=site.groups * heads))
        for name, heads in _heads_in_group(chain[-1][0], config).items()
    }


def _mlp_site(up: bool, holder: Any, kind: str, *, transposed: bool = False) -> ParamSite:
    if up and holder.config.gated_linear_unit:
        return ParamSite(role=f"{kind}_gate_up", transposed=transposed, fused="stacked")
    return ParamSite(role=f"{kind}_{'up' if up else 'down'}", transposed=transposed)


def _attention_site(attribute: str, module: Any) -> ParamSite:
    heads = module.config.num_attention_heads
    latent = isinstance(module, MultiLatentAttention)
    if attribute == "linear_proj":
        return ParamSite(role="attention_o", heads=heads, head_dim_index=1)
    if attribute in (("linear_q_proj", "linear_q_up_proj") if latent else ("linear_q",)):
        return ParamSite(role="attention_q", heads=heads)
    if latent:
        # Latent projections have rows of several kinds, not one head after another, so they are plain matrices.
        return ParamSite(role="matrix", latent=True)
    if attribute not in ("linear_qkv", "linear_kv"):
        return ParamSite(role=None)
    groups = (module.config.num_query_groups if attribute == "linear_qkv" else None) or heads
    size = sum(_heads_in_group(attribute, module.config).values())
    return ParamSite(role="attention_qkv", heads=groups * size, groups=groups)


def _heads_in_group(attribute: str, config: Any) -> dict[str, int]:
    """Return how many heads of each kind a fused attention weight has in a query group."""
    if attribute == "linear_kv":
        return {"k": 1, "v": 1}
    queries = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
    gates = {"gate": queries} if getattr(config, "attention_output_gate", False) else {}
    return {"q": queries, **gates, "k": 1, "v": 1}
