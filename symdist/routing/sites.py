"""Find out what each parameter is used for in a transformer, from the modules around it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from symdist.layouts.fsdp1 import read_units, whole_shape
from symdist.param_names import WRAPPERS, plain_name

ModuleChain: TypeAlias = list[tuple[str, nn.Module]]
"""The modules around a parameter, from the root to its own, each with the attribute that holds it; without wrappers."""

_HEADS = {"lm_head", "output", "head", "unembed", "embed_out", "output_layer"}
# The rows of these projections of multi-head latent attention are not one head after another, so they get the plain
# role "matrix".
_LATENT = dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "matrix")
_ATTENTION = {
    **_LATENT,
    **dict.fromkeys(("q_proj", "wq", "query", "q_b_proj", "to_q"), "attention_q"),
    **dict.fromkeys(("k_proj", "wk", "key", "to_k"), "attention_k"),
    **dict.fromkeys(("v_proj", "wv", "value", "to_v"), "attention_v"),
    **dict.fromkeys(("o_proj", "wo", "out_proj", "dense", "c_proj", "proj"), "attention_o"),
    **dict.fromkeys(("qkv_proj", "qkv", "c_attn", "in_proj", "Wqkv", "query_key_value"), "attention_qkv"),
}
_MLP = {
    **dict.fromkeys(("gate_proj", "w1", "wg"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "fc1", "c_fc", "linear1", "dense_h_to_4h", "fc_in"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "c_proj", "linear2", "dense_4h_to_h", "fc_out", "wo"), "down"),
    "gate_up_proj": "gate_up",
}
# Whether weight decay of a norm's scale helps depends on whether the norm comes before or after a linear map
# (arXiv 2605.26895).
_NORMS = {
    **dict.fromkeys(("input_layernorm", "pre_self_attn_layernorm", "pre_cross_attn_layernorm"), "input_norm"),
    **dict.fromkeys(("pre_mlp_layernorm", "pre_feedforward_layernorm", "pre_ff_layernorm"), "input_norm"),
    **dict.fromkeys(("q_a_layernorm", "kv_a_layernorm", "kv_layernorm", "enorm", "hnorm"), "input_norm"),
    "layer_norm_weight": "input_norm",
    **dict.fromkeys(("post_self_attn_layernorm", "post_cross_attn_layernorm"), "output_norm"),
    "post_feedforward_layernorm": "output_norm",
    **dict.fromkeys(("q_norm", "k_norm", "qk_norm", "query_norm", "key_norm", "norm_q", "norm_k"), "qk_norm"),
    **dict.fromkeys(("q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"), "qk_norm"),
}
_ATTENTION_WORDS = ("attn", "attention")
_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_KV_COUNTS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")


@dataclass(frozen=True, kw_only=True)
class ParamSite:
    """What a parameter is used for, and how it is stored.

    Attributes:
        role: The role, such as "attention_q"; None for a matrix of unknown use.
        heads: The number of heads, if the matrix consists of heads one after another; else None.
        head_dim_index: The dimension of the stored matrix along which the heads lie: 0 for rows, 1 for columns.
        groups: The number of query groups, if a fused q, k and v consists of them one after another; else None.
        transposed: Whether the matrix is stored as `[in, out]` instead of `[out, in]`.
        fused: How gate and up projections share a tensor: "stacked" (all gates, then all ups, in each of the `blocks`)
            or "interleaved" (gates and ups alternate). None if they do not.
        blocks: The number of blocks of a "stacked" tensor, each with the gates of some neurons and then their ups.
        latent: Whether the matrix projects to or from the latents of multi-head latent attention. Its input then counts
            as the residual stream.
        likely: The role to suggest to the user if `role` is None.
    """

    role: str | None
    heads: int | None = None
    head_dim_index: int = 0
    groups: int | None = None
    transposed: bool = False
    fused: Literal["stacked", "interleaved"] | None = None
    blocks: int = 1
    latent: bool = False
    likely: str = "matrix"


def find_sites(model: nn.Module) -> dict[str, tuple[nn.Parameter, ParamSite]]:
    """Find every trainable parameter of a model and what it is used for.

    Args:
        model: The model, sharded or not.

    Returns:
        Parameter and site by name. Names are without what wrappers add, see `symdist.param_names`. Tied parameters
        appear once, under their first name.

    Raises:
        ValueError: If FSDP has joined parameters into one flat parameter.

    Example:
        >>> find_sites(model)["model.layers.3.self_attn.q_proj.weight"][1].role
        'attention_q'
    """
    read_units(model)
    embeddings = {id(weight) for weight in _embedding_weights(model)}
    heads = {id(weight) for weight in _output_weights(model)}
    sites: dict[str, tuple[nn.Parameter, ParamSite]] = {}
    for name, parameter, chain in walk([model]):
        if id(parameter) in embeddings:
            site = ParamSite(role="tied_embedding" if id(parameter) in heads else "embedding")
        elif id(parameter) in heads:
            site = ParamSite(role="head")
        else:
            site = site_of(name.rsplit(".", 1)[-1], whole_shape(parameter), chain)
        plain = plain_name(name)
        sites[plain if plain not in sites else name] = (parameter, site)
    return sites


def walk(models: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter, ModuleChain]]:
    """Yield every trainable parameter once, under its first name.

    Args:
        models: The models, or the parts of one.

    Yields:
        The name, which includes what wrappers add; the parameter; and the modules around it. In their chain, a wrapped
        module takes the place of its wrapper.
    """

    def descend(module: nn.Module, prefix: str, chain: ModuleChain) -> Iterator[tuple[str, nn.Parameter, ModuleChain]]:
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + leaf, parameter, chain
        for attribute, child in module.named_children():
            if attribute in WRAPPERS or (attribute == "module" and len(list(module.children())) == 1):
                inner = [*chain[:-1], (chain[-1][0], child)]
            else:
                inner = [*chain, (attribute, child)]
            yield from descend(child, f"{prefix}{attribute}.", inner)

    visited: set[int] = set()
    for model in models:
        for name, parameter, chain in descend(model, "", [("", model)]):
            if parameter.requires_grad and id(parameter) not in visited:
                visited.add(id(parameter))
                yield name, parameter, chain


def _embedding_weights(model: nn.Module) -> list[Tensor]:
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding) or type(m).__name__.endswith("Embedding"))
    return [m.weight for m in embeddings if isinstance(getattr(m, "weight", None), Tensor)]  # type: ignore[misc]


def _output_weights(model: nn.Module) -> list[Tensor]:
    vocabularies = {whole_shape(weight)[0] for weight in _embedding_weights(model)}
    weights = []
    for name, module in model.named_modules():
        plain = plain_name(name)
        if isinstance(module, nn.Linear) and plain.rsplit(".", 1)[-1] in _HEADS:
            weight = module.weight
            if isinstance(weight, Tensor) and (plain in _HEADS or whole_shape(weight)[0] in vocabularies):
                weights.append(weight)
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    return weights + ([declared.weight] if declared is not None else [])


def site_of(leaf: str, shape: tuple[int, ...], chain: ModuleChain) -> ParamSite:
    """Return the site of a parameter that is neither an embedding nor a head.

    Args:
        leaf: The name under which its module holds it, such as "weight".
        shape: The shape of the whole parameter.
        chain: The modules around it.

    Returns:
        The site, with role None for a matrix of unknown use.
    """
    attribute, module = chain[-1]
    parent = chain[-2][1] if len(chain) > 1 else module
    kind = type(module).__name__
    router = kind.endswith("Router") or (attribute in ("router", "gate") and hasattr(parent, "experts"))
    if router:
        return ParamSite(role="router" if len(shape) == 2 else "router_bias")
    if leaf.endswith("bias") or leaf.endswith("_bias"):
        return ParamSite(role="bias")
    if leaf == "sinks":
        return ParamSite(role="sink")
    if "norm" in kind.lower():
        return ParamSite(role=norm_role(attribute, parent))
    if len(shape) < 2:
        return ParamSite(role="other")
    # The weight of a linear layer is identified by the layer's attribute name. A parameter that its module holds
    # directly (stacked experts, in_proj_weight) is identified by its own name.
    word, holder = (attribute, parent) if leaf == "weight" else (leaf.removesuffix("_weight"), module)
    if any("experts" in name for name, _ in chain):
        return _expert_site(word, module, shape)
    transposed = kind == "Conv1D"
    around = [name for name, _ in chain] + [type(m).__name__ for _, m in chain[-2:]]
    if word in _ATTENTION and any(w in text.lower() for text in around for w in _ATTENTION_WORDS):
        # There is no view for the heads of a weight stored [in, out]. Leave `heads` unset, so that a recipe that asks
        # for them gets an error.
        if transposed:
            return ParamSite(role=_ATTENTION[word], transposed=True)
        return _attention_site(word, holder, shape)
    if word in _MLP:
        return _mlp_site(word, "mlp_", transposed=transposed)
    return ParamSite(role=None, likely=_likely(attribute, module, shape))


def _likely(attribute: str, module: nn.Module, shape: tuple[int, ...]) -> str:
    """Guess the role of a weight of unknown use: "other" if its shape or a convolution says that it is no matrix."""
    convolves = "conv" in type(module).__name__.lower() or "conv" in attribute.lower()
    if len(shape) > 3 or (len(shape) == 3 and convolves) or 1 in shape[-2:]:
        return "other"
    if len(shape) == 2 and shape[0] < shape[1] and any(word in attribute.lower() for word in ("gate", "router")):
        return "router"
    return "matrix"


def norm_role(name: str, holder: nn.Module) -> str:
    """Return the role of a norm from the name a block gives it.

    Args:
        name: The attribute under which the block holds the norm.
        holder: The block. Its other attributes decide where models use the same name for different kinds of norm.

    Returns:
        "input_norm" (before a linear map), "output_norm" (after one, before the residual sum), "qk_norm", or "norm" if
        the kind is not known.
    """

    def has(*names: str) -> bool:
        return any(getattr(holder, attribute, None) is not None for attribute in names)

    if "Swin" in type(holder).__name__ or getattr(holder, "norm_after", False):
        # These blocks of Chameleon and Molmo 2 normalize their outputs, under names that elsewhere mean input norms.
        return "norm"
    match name:
        case "norm" | "final_norm" | "final_layernorm" | "final_layer_norm":
            # The final norm of a stack of layers, or a norm in a multi-token prediction module. Elsewhere these names
            # do not show the kind.
            return "input_norm" if has("layers", "eh_proj") else "norm"
        case "post_attention_layernorm":
            if has("pre_feedforward_layernorm", "pre_mlp_layernorm", "post_feedforward_layernorm"):
                return "output_norm"
            # In blocks without a norm before attention, this norm comes after the residual sum.
            return "input_norm" if has("input_layernorm") else "norm"
        case "post_mlp_layernorm":
            return "output_norm" if has("pre_mlp_layernorm", "post_self_attn_layernorm") else "norm"
        case "q_layernorm" if has("kv_layernorm"):
            # Normalizes the latent of multi-head latent attention, which then goes into an up projection.
            return "input_norm"
        case "q_norm" if has("kv_norm"):
            # In DeepSeek's own code, where this may be the norm of a latent instead.
            return "norm"
    return _NORMS.get(name, "norm")


def _expert_site(word: str, module: nn.Module, shape: tuple[int, ...]) -> ParamSite:
    if word not in _MLP:
        return ParamSite(role=None)
    if len(shape) < 3:
        return _mlp_site(word, "expert_", transposed=type(module).__name__ == "Conv1D")
    # In transformers, modules of stacked experts declare their storage. Elsewhere, assume [expert, out, in] with gate
    # before up.
    transposed = bool(getattr(module, "is_transposed", False))
    stacked = bool(getattr(module, "is_concatenated", True))
    fused: Literal["stacked", "interleaved"] | None = None
    if word == "gate_up_proj":
        fused = "stacked" if stacked else "interleaved"
    return ParamSite(role=f"expert_{_MLP[word]}", transposed=transposed, fused=fused)


def _mlp_site(word: str, prefix: str, *, transposed: bool) -> ParamSite:
    fused: Literal["stacked"] | None = "stacked" if word == "gate_up_proj" and not transposed else None
    return ParamSite(role=prefix + _MLP[word], transposed=transposed, fused=fused)


def _attention_site(word: str, attention: nn.Module, shape: tuple[int, ...]) -> ParamSite:
    role = _ATTENTION[word]
    index = 1 if role == "attention_o" else 0
    size = shape[index]
    heads = None
    if word not in _LATENT:
        head_dim = getattr(attention, "head_dim", None)
        if isinstance(head_dim, int) and size % head_dim == 0:
            heads = size // head_dim
        elif head_dim is None and role != "attention_qkv":
            counts = _KV_COUNTS if role in ("attention_k", "attention_v") else ()
            heads = _count(attention, (*counts, *_COUNTS))
    return ParamSite(role=role, heads=heads, head_dim_index=index, latent=word in _LATENT)


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    counts = (getattr(module, name, None) for name in names)
    return next((count for count in counts if isinstance(count, int)), None)
