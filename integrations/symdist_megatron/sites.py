"""Find out what each parameter of a Megatron model is used for, from its modules and their configuration."""

from itertools import pairwise
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import attention, mlp
from megatron.core.transformer.moe import experts, router
from torch import nn
from torch.nn.modules.conv import _ConvNd

from symdist.routing.evidence import site_of
from symdist.routing.facts import ModuleChain
from symdist.routing.fused_weights import Sections
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
    if isinstance(module, router.Router):
        if parameter.dim() == 2:
            return ParamSite(role="router", stream="input", evidence="class")
        return ParamSite(role="router_bias", evidence="class")
    if leaf == "softmax_offset":
        return ParamSite(role="sink", evidence="class")
    if isinstance(module, _ConvNd) or (_is_mixer(module) and leaf.startswith("conv1d")):
        return ParamSite(role="convolution", evidence="class")
    if _is_mixer(module):
        return ParamSite(role="state_space" if parameter.dim() < 2 else None, evidence="class")
    if parameter.dim() < 2 and "norm" in leaf:
        # The norm is fused with the linear layer that follows it.
        return ParamSite(role=norm_role(leaf, module), evidence="class")
    if parameter.dim() < 2 and attribute == "norm" and _is_a(parent, "MambaLayer"):
        return ParamSite(role="input_norm", evidence="class")
    if parameter.dim() < 2 or leaf.startswith("bias"):
        # Grouped linear layers name their biases bias0, bias1, ….
        return site_of(leaf.rstrip("0123456789"), tuple(parameter.shape), chain)
    if is_vocabulary(chain) or type(module) is nn.Embedding:
        return ParamSite(role=_embedding_role(chain), stream="input", evidence="class")
    if stacks_experts(module):
        return _mlp_site(leaf == "weight1", module, "expert", transposed=True)
    if leaf == "gate_weight":
        # A shared expert's gate has a single row, so it is no router.
        return ParamSite(role="gate", stream="input", evidence="class")
    known: ParamSite | None = None
    if _is_mixer(parent):
        known = _mixer_site(attribute, parent)
    elif isinstance(parent, attention.Attention):
        known = _attention_site(attribute, parent)
    elif attribute in ("linear_fc1", "linear_fc2") and isinstance(parent, (mlp.MLP, *_EXPERTS)):
        known = _mlp_site(attribute == "linear_fc1", parent, "expert" if in_experts(chain) else "mlp")
    elif _is_a(parent, "DSAIndexer"):
        known = ParamSite(role="indexer", stream="input", evidence="class")
    elif _is_a(parent, "MultiTokenPredictionLayer") and attribute == "eh_proj":
        # It reads a hidden state and an embedding, side by side.
        known = ParamSite(role="matrix", stream="output", evidence="class")
    elif _is_a(parent, "MoELayer") and attribute in ("fc1_latent_proj", "fc2_latent_proj"):
        known = ParamSite(role="matrix", stream="input" if attribute[2] == "1" else "output", evidence="class")
    elif leaf == "weight" and attribute in ("gate", "router") and hasattr(parent, "experts"):
        known = ParamSite(role="router", stream="input", evidence="name")
    if known is None and leaf.startswith("weight") and _is_linear(module):
        known = _linear_site(module)
    return known or ParamSite(role=None)


def sections_of(site: ParamSite, shape: tuple[int, ...], chain: ModuleChain, *, ranks: int) -> Sections:
    """Return the sections of a fused weight.

    Args:
        site: The weight's site.
        shape: The shape of each rank's part of it.
        chain: The modules around the weight.
        ranks: The number of tensor-parallel ranks that hold parts of it.

    Returns:
        The sections; without any if the weight is not fused.
    """
    attribute, module = chain[-1]
    parent: Any = chain[-2][1] if len(chain) > 1 else module
    if site.fused is not None:
        kind = str(site.role).partition("_")[0]
        sites = {
            name: ParamSite(role=f"{kind}_{name}", transposed=site.transposed, stream="input", evidence="class")
            for name in ("gate", "up")
        }
        half = shape[1 if site.transposed else 0] // 2
        return Sections(repeats=ranks, by_name={name: (half, section) for name, section in sites.items()})
    if site.groups is not None:
        config: Any = parent.config
        roles = {"q": "attention_q", "gate": "attention_gate", "k": "attention_k", "v": "attention_v"}
        return Sections(
            repeats=site.groups,
            by_name={
                name: (
                    heads * config.kv_channels,
                    ParamSite(role=roles[name], heads=site.groups * heads, stream="input", evidence="config"),
                )
                for name, heads in _heads_in_group(attribute, config).items()
            },
        )
    if _is_mixer(parent) and attribute == "in_proj":
        return Sections(
            repeats=ranks,
            by_name={
                name: (size, ParamSite(role=role, heads=heads, stream="input", evidence="config"))
                for name, (role, size, heads) in _mixer_sections(parent).items()
            },
        )
    if attribute == "linear_qkv_down_proj":
        # Unlike in a mixer, tensor parallelism cuts the rows of all sections as a whole.
        config = parent.config
        sizes = {"q": config.q_lora_rank, "kv": config.kv_lora_rank + config.qk_pos_emb_head_dim}
        return Sections(by_name={name: (size, site) for name, size in sizes.items()})
    return Sections()


def _embedding_role(chain: ModuleChain) -> str:
    attribute = chain[-1][0]
    shared = any(getattr(holder, "share_embeddings_and_output_weights", False) for _, holder in chain)
    if shared and attribute in ("word_embeddings", "output_layer"):
        return "tied_embedding"
    return {"output_layer": "head", "position_embeddings": "position_embedding"}.get(attribute, "embedding")


def _mlp_site(up: bool, holder: Any, kind: str, *, transposed: bool = False) -> ParamSite:
    if up and holder.config.gated_linear_unit:
        return ParamSite(
            role=f"{kind}_gate_up", transposed=transposed, fused="stacked", stream="input", evidence="class"
        )
    return ParamSite(
        role=f"{kind}_{'up' if up else 'down'}",
        transposed=transposed,
        stream="input" if up else "output",
        evidence="class",
    )


def _attention_site(attribute: str, module: Any) -> ParamSite | None:
    heads = module.config.num_attention_heads
    match attribute:
        case "linear_proj":
            return ParamSite(role="attention_o", heads=heads, head_dim_index=1, stream="output", evidence="config")
        case "linear_q" | "linear_q_proj":
            return ParamSite(role="attention_q", heads=heads, stream="input", evidence="config")
        case "linear_q_up_proj":
            return ParamSite(role="attention_q", heads=heads, latent=True, evidence="config")
        case "linear_k_up_proj" | "linear_v_up_proj":
            return ParamSite(role=f"attention_{attribute[7]}", heads=heads, latent=True, evidence="config")
        case "linear_q_down_proj" | "linear_kv_down_proj" | "linear_qkv_down_proj":
            return ParamSite(role="matrix", latent=True, stream="input", evidence="class")
        case "linear_kv_up_proj":
            # For each head, the rows of its keys and then those of its values, which may be of another number.
            return ParamSite(role="matrix", latent=True, evidence="class")
        case "linear_qkv" | "linear_kv":
            groups = (module.config.num_query_groups if attribute == "linear_qkv" else None) or heads
            size = sum(_heads_in_group(attribute, module.config).values())
            return ParamSite(
                role="attention_qkv", heads=groups * size, groups=groups, stream="input", evidence="config"
            )
    return None


def _heads_in_group(attribute: str, config: Any) -> dict[str, int]:
    """Return how many heads of each kind a fused attention weight has in a query group."""
    if attribute == "linear_kv":
        return {"k": 1, "v": 1}
    queries = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
    gates = {"gate": queries} if getattr(config, "attention_output_gate", False) else {}
    return {"q": queries, **gates, "k": 1, "v": 1}


def _mixer_site(attribute: str, mixer: Any) -> ParamSite | None:
    mamba = _is_a(mixer, "MambaMixer")
    if attribute == "in_proj":
        return ParamSite(role="mixer_in" if mamba else "attention", stream="input", evidence="class")
    if attribute == "out_proj":
        role, heads = ("mixer_out", mixer.nheads) if mamba else ("attention_o", mixer.num_value_heads)
        return ParamSite(role=role, heads=heads, head_dim_index=1, stream="output", evidence="config")
    return None


def _mixer_sections(mixer: Any) -> dict[str, tuple[str, int, int]]:
    """Return the sections of a mixer's `in_proj`, in order: the role, the rows on each rank, and the heads on all."""
    if _is_a(mixer, "MambaMixer"):
        states = mixer.ngroups_local_tp * mixer.d_state
        return {
            "z": ("mixer_in", mixer.d_inner_local_tp, mixer.nheads),
            "x": ("mixer_in", mixer.d_inner_local_tp, mixer.nheads),
            "B": ("mixer_in", states, mixer.ngroups),
            "C": ("mixer_in", states, mixer.ngroups),
            "dt": ("mixer_in", mixer.nheads_local_tp, 1),
        }
    # Linear attention, with an output gate and, for each head, a rate of writing and one of forgetting.
    keys, values, ranks = mixer.num_key_heads, mixer.num_value_heads, mixer.tp_size
    return {
        "query": ("attention_q", mixer.qk_dim // ranks, keys),
        "key": ("attention_k", mixer.qk_dim // ranks, keys),
        "value": ("attention_v", mixer.v_dim // ranks, values),
        "z": ("attention_gate", mixer.v_dim // ranks, values),
        "beta": ("attention_gate", values // ranks, values),
        "alpha": ("attention_gate", values // ranks, values),
    }


def _is_mixer(module: nn.Module) -> bool:
    return _is_a(module, "MambaMixer", "GatedDeltaNet")


def _is_a(module: nn.Module, *names: str) -> bool:
    """Return whether a module is of a class of megatron-core's, which might lack what it needs to be imported."""
    return any(each.__name__ in names and each.__module__.startswith("megatron.core.") for each in type(module).__mro__)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by its weight; all modules of Transformer Engine with a `weight` do."""
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear, nn.Linear)):
        return True
    return any(each.__name__ == "TransformerEngineBaseModule" for each in type(module).__mro__)


def _linear_site(module: Any) -> ParamSite:
    """Return the site of a linear layer that nothing else explains, from the sides that are the residual stream."""
    # Megatron's layers have the sizes of the whole weight under other names.
    into = getattr(module, "input_size", None) or getattr(module, "in_features", None)
    out = getattr(module, "output_size", None) or getattr(module, "out_features", None)
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    role = "gate" if out == 1 else "matrix"
    if width is None or (into == width) == (out == width):
        # Its input counts as the stream.
        return ParamSite(role=role, stream="input", evidence="type")
    return ParamSite(role=role, stream="output" if out == width else "input", evidence="residual stream")
