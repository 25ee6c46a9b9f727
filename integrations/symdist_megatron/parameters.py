"""Describes a Megatron model's parameters by their modules and configuration, and the matrices each consists of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import attention, mlp
from megatron.core.transformer.moe import experts, router
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import nn

from symdist.routing.recipes import Recipe
from symdist.routing.sites import ParamSite, norm_role
from symdist_megatron.rank_grid import RankGrids
from symdist_megatron.strided_slice import StridedSlice

# megatron-core 0.17 dropped GroupedMLP.
_EXPERTS = tuple(
    getattr(experts, name) for name in ("GroupedMLP", "TEGroupedMLP", "SequentialMLP") if hasattr(experts, name)
)


@dataclass(frozen=True, kw_only=True)
class MatrixSpec:
    """A matrix or vector that a parameter consists of, alone or beside others.

    In every rank's part of the parameter, it lies among the `size` elements from `base` on. `strided_slice` selects its
    elements from these stretches of all tensor-parallel ranks, put one after another.

    Attributes:
        name: Its name: the parameter's, followed by a suffix in brackets if the parameter consists of several.
        shape: Its full shape, on all tensor-parallel ranks.
        site: What it is used for, and how it is stored.
        base: The offset of its stretch in every rank's part of the parameter.
        size: The number of elements of that stretch.
        strided_slice: Which elements are its own.
        cut: The dimension along which tensor parallelism cuts it; None (default) if every rank has all of it.
        widths: The size along `cut` on each tensor-parallel rank; empty by default.
        vocabulary: Whether its rows are those of the vocabulary, padded to a size that tensor parallelism divides.
            False by default.
        opaque: Whether each rank holds several pieces of it, and nothing says which. False by default.
    """

    name: str
    shape: tuple[int, ...]
    site: ParamSite
    base: int
    size: int
    strided_slice: StridedSlice
    cut: int | None = None
    widths: tuple[int, ...] = ()
    vocabulary: bool = False
    opaque: bool = False


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A parameter and its matrices.

    Attributes:
        name: A name that is the same under every parallel layout.
        parameter: The parameter.
        expert: Whether it belongs to an expert, and so is cut by the experts' tensor parallelism.
        units: The matrices or vectors it consists of.
    """

    name: str
    parameter: nn.Parameter
    expert: bool
    units: tuple[MatrixSpec, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A section of a fused dimension: `size` rows in each of its periods."""

    name: str
    size: int
    site: ParamSite


def describe(chunks: Sequence[nn.Module], *, rank_grids: RankGrids, recipe: Recipe) -> list[ParamSpec]:
    """Describe every trainable parameter of a rank's model chunks, each once.

    A fused q, k and v becomes one matrix each, unless the recipe has a section `attention_qkv` or gives all of them the
    same options with `view = "heads"`. The gate and up of a dense MLP become two, unless the recipe has a section
    `mlp_gate_up` or gives it `view = "neurons"`.

    Args:
        chunks: This rank's model chunks.
        rank_grids: The ranks that hold dense parameters and experts.
        recipe: The recipe.

    Returns:
        The parameters, in the order of the model.

    Raises:
        ValueError: If the shape of a parameter contradicts its module, or its tensor parallelism is unknown or not
            supported. The message names the parameter.
    """
    found: list[ParamSpec] = []
    seen: set[int] = set()
    for chunk in chunks:
        for name, parameter, chain in _walk(chunk, rank_grids):
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                found.append(_describe(name, parameter, chain, rank_grids=rank_grids, recipe=recipe))
    return found


def _walk(chunk: nn.Module, rank_grids: RankGrids) -> Iterator[tuple[str, nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Yield name, parameter, and the chain of (attribute, module) from the model to the module that holds it.

    Names have the numbers of layers and experts in the whole model.
    """

    def descend(module: nn.Module, prefix: str, chain: list[tuple[str, nn.Module]]) -> Any:
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + leaf, parameter, chain
        for attribute, child in module.named_children():
            place = attribute
            if chain[-1][0] == "layers" and isinstance(getattr(child, "layer_number", None), int):
                place = str(child.layer_number - 1)  # type: ignore[operator]
            elif chain[-1][0] == "local_experts":
                place = str(rank_grids.expert_rank * len(module._modules) + int(attribute))
            # DDP and half-precision modules hold the model as `module`; names leave that out.
            inner = prefix if attribute == "module" and len(chain) <= 3 else f"{prefix}{place}."
            yield from descend(child, inner, [*chain, (attribute, child)])

    yield from descend(chunk, "", [("", chunk)])


def _describe(
    name: str, parameter: nn.Parameter, chain: list[tuple[str, nn.Module]], *, rank_grids: RankGrids, recipe: Recipe
) -> ParamSpec:
    expert = not getattr(parameter, "allreduce", True) or any(isinstance(module, _EXPERTS) for _, module in chain)
    ranks, dense = rank_grids.tensor_ranks(expert=expert), rank_grids.tensor_ranks(expert=False)
    if rank_grids.of(parameter, expert=expert) is rank_grids.dense and ranks != dense:
        raise ValueError(
            f"{name}: tensor parallelism is over {dense} ranks for all but experts, and over {ranks} for these, whose "
            "gradients Megatron then reduces over the wrong ranks where there is no expert parallelism; set "
            f"expert_tensor_parallel_size={dense}, as tensor_model_parallel_size is, or expert_model_parallel_size "
            "above 1"
        )
    if expert and parameter.dim() == 3:
        raise ValueError(
            f"{name} holds all experts in one tensor of shape {tuple(parameter.shape)}: symdist takes them apart only; "
            "set moe_single_grouped_weight=False"
        )
    holder = chain[-1][1]
    if type(holder).__name__ == "GroupedMLP" and isinstance(holder, _EXPERTS):
        units = _grouped(name, parameter, holder, ranks=ranks, rank_grids=rank_grids, recipe=recipe)
        return ParamSpec(name=name, parameter=parameter, expert=True, units=units)
    site, parts, count = _site(name.rsplit(".", 1)[-1], parameter, chain, recipe=recipe)
    cut = _cut(name, parameter, site, holder, expert=expert) if ranks > 1 and parameter.dim() == 2 else None
    strange = cut is not None and site.fused is None and getattr(parameter, "partition_stride", 1) != 1
    if strange:
        cut = None
    shape = tuple(size * (ranks if i == cut else 1) for i, size in enumerate(parameter.shape))
    if site.fused is not None:
        site = replace(site, blocks=ranks)
    kind = str(site.role).partition("_")[0]
    if site.fused is not None and _gates_apart(recipe, kind):
        rows = parameter.shape[0] // 2
        parts = [_Part(name=part, size=rows, site=ParamSite(role=f"{kind}_{part}")) for part in ("gate", "up")]
        count = ranks
    if not parts:
        whole = MatrixSpec(
            name=name,
            shape=shape,
            site=site,
            base=0,
            size=parameter.numel(),
            strided_slice=StridedSlice.whole(parameter.numel() * (ranks if cut is not None else 1)),
            cut=cut,
            widths=() if cut is None else (parameter.shape[cut],) * ranks,
            vocabulary=isinstance(holder, VocabParallelEmbedding) or chain[-1][0] == "output_layer",
            opaque=strange,
        )
        return ParamSpec(name=name, parameter=parameter, expert=expert, units=(whole,))
    period = sum(part.size for part in parts)
    if shape[0] != count * period:
        raise ValueError(
            f"{name} has {shape[0]} rows; its module says {count} times {' + '.join(str(part.size) for part in parts)}"
        )
    return ParamSpec(
        name=name,
        parameter=parameter,
        expert=expert,
        units=tuple(_sections(name, parameter, parts, count=count, cut=cut, ranks=ranks)),
    )


def _sections(
    name: str, parameter: nn.Parameter, parts: Sequence[_Part], *, count: int, cut: int | None, ranks: int
) -> Iterator[MatrixSpec]:
    """Yield a matrix for every part of a fused weight's rows."""
    width, size = parameter.shape[1], parameter.numel()
    period = sum(part.size for part in parts) * width
    start = 0
    for part in parts:
        strided_slice = StridedSlice(count=count, period=period, start=start, stop=start + part.size * width)
        start = strided_slice.stop
        yield MatrixSpec(
            name=f"{name}[{part.name}]",
            shape=(count * part.size, width),
            site=part.site,
            base=0,
            size=size,
            strided_slice=strided_slice,
            cut=cut,
            widths=()
            if cut is None
            else tuple(strided_slice.between(rank * size, (rank + 1) * size) // width for rank in range(ranks)),
        )


def _grouped(
    name: str, parameter: nn.Parameter, module: Any, *, ranks: int, rank_grids: RankGrids, recipe: Recipe
) -> tuple[MatrixSpec, ...]:
    """Describe the experts of a grouped MLP, stored as `[expert, in, out]` whatever the parameter's shape is."""
    count, hidden = module.num_local_experts, module.config.hidden_size
    first = rank_grids.expert_rank * count
    size = parameter.numel() // count
    inner = size // hidden
    up = name.endswith("weight1")
    gated = up and module.config.gated_linear_unit
    role = f"expert_{'gate_up' if gated else 'up' if up else 'down'}"
    site = ParamSite(role=role, transposed=True, fused="stacked" if gated else None, blocks=ranks)
    slices = [("", site, StridedSlice.whole(size * ranks), inner)]
    if gated and _gates_apart(recipe, "expert"):
        half = inner // 2
        slices = [
            (
                f"[{part}]",
                ParamSite(role=f"expert_{part}", transposed=True),
                StridedSlice(count=ranks * hidden, period=inner, start=i * half, stop=(i + 1) * half),
                half,
            )
            for i, part in enumerate(("gate", "up"))
        ]
    return tuple(
        MatrixSpec(
            name=f"{name}[{first + i}]{suffix}",
            shape=(hidden, ranks * width) if up else (ranks * width, hidden),
            site=its_site,
            base=i * size,
            size=size,
            strided_slice=strided_slice,
            cut=None if ranks == 1 else (1 if up else 0),
            widths=() if ranks == 1 else (width,) * ranks,
        )
        for i in range(count)
        for suffix, its_site, strided_slice, width in slices
    )


def _gates_apart(recipe: Recipe, kind: str) -> bool:
    """Return whether a fused gate and up are two matrices.

    In a dense MLP they are unless the recipe says otherwise, because many models store them apart. In experts they are
    only if the recipe says so, because other models store them as one as well.
    """
    role = f"{kind}_gate_up"
    view = (recipe.options(role) or {}).get("view")
    if view == "apart" or any(f"{kind}_{part}" in recipe.sections for part in ("gate", "up")):
        return True
    return kind == "mlp" and role not in recipe.sections and view != "neurons"


def _cut(name: str, parameter: Any, site: ParamSite, holder: nn.Module, *, expert: bool) -> int | None:
    """Return the dimension along which tensor parallelism cuts a matrix, or None."""
    # Transformer Engine's linears mark weights as cut without knowing: those of experts, and those whole on all ranks.
    declared = {"expert_gate_up": 0, "expert_up": 0, "expert_down": 1}.get(str(site.role))
    if expert and declared is not None:
        return declared
    if not expert and getattr(holder, "parallel_mode", "") is None:
        return None
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)
    if isinstance(holder, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
        raise ValueError(
            f"{name} does not say how tensor parallelism cuts it, as with perform_initialization=False: Megatron's own "
            "norms need to know as well; leave that out, or call set_tensor_model_parallel_attributes on the weight"
        )
    return None


def _site(
    leaf: str, parameter: nn.Parameter, chain: list[tuple[str, nn.Module]], *, recipe: Recipe
) -> tuple[ParamSite, list[_Part], int]:
    """Return a parameter's site, the parts it is taken apart into (if any), and how often these repeat."""
    attribute, module = chain[-1]
    parent: Any = chain[-2][1] if len(chain) > 1 else module
    if isinstance(module, router.Router):
        return ParamSite(role="router" if parameter.dim() == 2 else "router_bias"), [], 1
    if leaf == "bias" or leaf.startswith("bias"):
        return ParamSite(role="bias"), [], 1
    if parameter.dim() < 2:
        if "norm" in leaf:
            # The norm is fused with the linear layer that follows it.
            return ParamSite(role=norm_role(leaf, module)), [], 1
        norm = "norm" in type(module).__name__.lower()
        return ParamSite(role=norm_role(attribute, parent) if norm else "other"), [], 1
    if isinstance(module, VocabParallelEmbedding) or type(module) is nn.Embedding or attribute == "output_layer":
        return ParamSite(role=_vocabulary_role(attribute, chain)), [], 1
    if isinstance(parent, attention.Attention):
        return _attention_site(attribute, parent, recipe=recipe)
    if attribute in ("linear_fc1", "linear_fc2") and isinstance(parent, (mlp.MLP, *_EXPERTS)):
        kind = "expert" if any(isinstance(each, _EXPERTS) for _, each in chain) else "mlp"
        if attribute == "linear_fc2":
            return ParamSite(role=f"{kind}_down"), [], 1
        gated: bool = chain[-2][1].config.gated_linear_unit  # type: ignore[union-attr, assignment]
        if gated:
            return ParamSite(role=f"{kind}_gate_up", fused="stacked"), [], 1
        return ParamSite(role=f"{kind}_up"), [], 1
    if leaf == "gate_weight":
        # The single row that gates a shared expert.
        return ParamSite(role="other"), [], 1
    return ParamSite(role=None), [], 1


def _vocabulary_role(attribute: str, chain: list[tuple[str, nn.Module]]) -> str:
    shared = any(getattr(module, "share_embeddings_and_output_weights", False) for _, module in chain)
    if attribute == "word_embeddings" and shared:
        return "tied_embedding"
    return ("tied_embedding" if shared else "head") if attribute == "output_layer" else "embedding"


def _attention_site(attribute: str, module: Any, *, recipe: Recipe) -> tuple[ParamSite, list[_Part], int]:
    config = module.config
    heads = config.num_attention_heads
    if attribute == "linear_proj":
        return ParamSite(role="attention_o", heads=heads, head_dim_index=1), [], 1
    if isinstance(module, MultiLatentAttention):
        # Latent projections have rows of several kinds, not one head after another, so they are plain matrices.
        queries = attribute in ("linear_q_proj", "linear_q_up_proj")
        return ParamSite(role="attention_q", heads=heads) if queries else ParamSite(role="matrix", latent=True), [], 1
    dim = config.kv_channels
    if attribute == "linear_q":
        return ParamSite(role="attention_q", heads=heads), [], 1
    groups = config.num_query_groups or heads
    if attribute == "linear_kv":
        return _fused(["k", "v"], [1, 1], groups=heads, dim=dim, recipe=recipe)
    if attribute == "linear_qkv":
        queries = heads // groups
        if getattr(config, "attention_output_gate", False):
            return _fused(["q", "gate", "k", "v"], [queries, queries, 1, 1], groups=groups, dim=dim, recipe=recipe)
        return _fused(["q", "k", "v"], [queries, 1, 1], groups=groups, dim=dim, recipe=recipe)
    return ParamSite(role=None), [], 1


def _fused(
    names: list[str], counts: list[int], *, groups: int, dim: int, recipe: Recipe
) -> tuple[ParamSite, list[_Part], int]:
    """Describe rows of several kinds of heads in every query group, `counts` of each kind."""
    whole = ParamSite(role="attention_qkv", heads=groups * sum(counts), groups=groups)
    roles = [f"attention_{'q' if name == 'gate' else name}" for name in names]
    options = [recipe.options(role) for role in roles]
    alike = all(each == options[0] for each in options) and (options[0] or {}).get("view") == "heads"
    if alike or "attention_qkv" in recipe.sections:
        return whole, [], 1
    parts = [
        _Part(name=name, size=count * dim, site=ParamSite(role=role, heads=groups * count))
        for name, role, count in zip(names, roles, counts, strict=True)
    ]
    return whole, parts, groups
