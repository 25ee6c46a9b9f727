"""Describe the matrices that each parameter of a Megatron model consists of, and how ranks hold them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from symdist.routing.recipes import Recipe
from symdist.routing.sites import ModuleChain, ParamSite, walk
from symdist_megatron.rank_grid import RankGrids
from symdist_megatron.sites import global_name, in_experts, is_vocabulary, megatron_site, sections_of, stacks_experts
from symdist_megatron.strided_slice import StridedSlice


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
        strided_slice: Which elements belong to it.
        cut: The dimension along which tensor parallelism cuts it; None (default) if every rank has all of it.
        widths: The size along `cut` on each tensor-parallel rank; empty by default.
        vocabulary: Whether its rows are those of the vocabulary, padded to a size that tensor parallelism divides.
            False by default.
        opaque: Whether each rank holds several pieces of it, and it is not known which. False by default.
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


def describe(chunks: Sequence[nn.Module], *, rank_grids: RankGrids, recipe: Recipe) -> list[ParamSpec]:
    """Describe every trainable parameter of a rank's model chunks, each once.

    Experts that are stored together become one matrix each. A fused q, k and v becomes one matrix each, unless the
    recipe has a section `attention_qkv` or gives all of them the same options with `view = "heads"`. The gate and up of
    a dense MLP become two, unless the recipe has a section `mlp_gate_up` or gives it `view = "neurons"`.

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
    specs = []
    for local_name, parameter, chain in walk(chunks):
        leaf = local_name.rpartition(".")[2]
        name = global_name(leaf, chain, expert_rank=rank_grids.expert_rank)
        expert = not getattr(parameter, "allreduce", True) or in_experts(chain)
        _check(name, parameter, expert=expert, rank_grids=rank_grids)
        site = megatron_site(leaf, parameter, chain)
        units = _matrices(name, parameter, site, chain, expert=expert, rank_grids=rank_grids, recipe=recipe)
        specs.append(ParamSpec(name=name, parameter=parameter, expert=expert, units=units))
    return specs


def _check(name: str, parameter: nn.Parameter, *, expert: bool, rank_grids: RankGrids) -> None:
    ranks, dense = rank_grids.tensor_ranks(expert=expert), rank_grids.tensor_ranks(expert=False)
    if rank_grids.of(parameter, expert=expert) is rank_grids.dense and ranks != dense:
        raise ValueError(
            f"{name}: expert_tensor_parallel_size={ranks} differs from tensor_model_parallel_size={dense}, and without "
            "expert parallelism Megatron then reduces the gradients of experts over the wrong ranks; set "
            f"expert_tensor_parallel_size={dense}, or expert_model_parallel_size above 1"
        )
    if expert and parameter.dim() == 3:
        raise ValueError(
            f"{name} holds all experts in one tensor, of shape {tuple(parameter.shape)}, which symdist does not "
            "support; set moe_single_grouped_weight=False"
        )


def _matrices(
    name: str,
    parameter: nn.Parameter,
    site: ParamSite,
    chain: ModuleChain,
    *,
    expert: bool,
    rank_grids: RankGrids,
    recipe: Recipe,
) -> tuple[MatrixSpec, ...]:
    holder: Any = chain[-1][1]
    ranks = rank_grids.tensor_ranks(expert=expert)
    cut = _cut(name, parameter, site, holder, expert=expert) if ranks > 1 and parameter.dim() == 2 else None
    opaque = cut is not None and site.fused is None and getattr(parameter, "partition_stride", 1) != 1
    if opaque:
        cut = None
    names, shape = [name], tuple(parameter.shape)
    if stacks_experts(holder):
        count, hidden = holder.num_local_experts, holder.config.hidden_size
        names = [f"{name}[{rank_grids.expert_rank * count + i}]" for i in range(count)]
        inner = parameter.numel() // count // hidden
        shape = (inner, hidden) if site.role == "expert_down" else (hidden, inner)
    size = parameter.numel() // len(names)
    if site.fused is not None:
        site = replace(site, blocks=ranks)
    dim = 1 if site.transposed else 0
    sections = sections_of(site, shape[dim], chain) if len(shape) == 2 else {}
    if cut is not None:
        shape = _resized(shape, cut, shape[cut] * ranks)
    selections = [("", shape, site, StridedSlice.whole(math.prod(shape)))]
    if sections and _are_apart(recipe, str(site.role), sections):
        selections = list(_selections(name, shape, dim, sections, repeats=site.groups or site.blocks))
    return tuple(
        MatrixSpec(
            name=unit_name + suffix,
            shape=unit_shape,
            site=unit_site,
            base=i * size,
            size=size,
            strided_slice=selected,
            cut=cut,
            widths=()
            if cut is None
            else tuple(selected.between(r * size, (r + 1) * size) // unit_shape[1 - cut] for r in range(ranks)),
            vocabulary=is_vocabulary(chain),
            opaque=opaque,
        )
        for i, unit_name in enumerate(names)
        for suffix, unit_shape, unit_site, selected in selections
    )


def _selections(
    name: str, shape: tuple[int, ...], dim: int, sections: Mapping[str, tuple[int, ParamSite]], *, repeats: int
) -> Iterator[tuple[str, tuple[int, ...], ParamSite, StridedSlice]]:
    """Yield the suffix, shape, site and elements of each section of a fused weight, which lie along `dim`."""
    sizes = [size for size, _ in sections.values()]
    if shape[dim] != repeats * sum(sizes):
        raise ValueError(
            f"{name} has {shape[dim]} rows, but by its module's config it should have {repeats} * "
            f"({' + '.join(map(str, sizes))}); symdist does not know this kind of fused weight"
        )
    width = math.prod(shape[dim + 1 :])
    period, start = sum(sizes) * width, 0
    for section, (size, site) in sections.items():
        stop = start + size * width
        selected = StridedSlice(count=math.prod(shape) // period, period=period, start=start, stop=stop)
        yield f"[{section}]", _resized(shape, dim, repeats * size), site, selected
        start = stop


def _resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _are_apart(recipe: Recipe, role: str, sections: Mapping[str, tuple[int, ParamSite]]) -> bool:
    """Return whether the sections of a fused weight are matrices of their own.

    Those of a fused q, k and v are, unless the recipe has a section for it or gives all of them the same options by
    heads. A fused gate and up of a dense MLP are unless the recipe says otherwise, because many models store them
    apart; of experts, only if the recipe says so, because other models store them as one as well.
    """
    options = recipe.options(role) or {}
    roles = [str(site.role) for _, site in sections.values()]
    if role == "attention_qkv":
        by_role = [recipe.options(section_role) for section_role in roles]
        alike = all(section_options == by_role[0] for section_options in by_role)
        return role not in recipe.sections and not (alike and (by_role[0] or {}).get("view") == "heads")
    if options.get("view") == "apart" or any(section_role in recipe.sections for section_role in roles):
        return True
    return role == "mlp_gate_up" and role not in recipe.sections and options.get("view") != "neurons"


def _cut(name: str, parameter: Any, site: ParamSite, holder: nn.Module, *, expert: bool) -> int | None:
    """Return the dimension along which tensor parallelism cuts a matrix, or None."""
    # Transformer Engine sets tensor_model_parallel wrongly on weights of experts, and on weights that every rank holds
    # whole. For these, the role and parallel_mode tell how they are cut.
    declared = {"expert_gate_up": 0, "expert_up": 0, "expert_down": 1}.get(str(site.role))
    if expert and declared is not None:
        return 1 - declared if site.transposed else declared
    if not expert and getattr(holder, "parallel_mode", "") is None:
        return None
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)
    if isinstance(holder, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
        raise ValueError(
            f"{name} lacks the attribute tensor_model_parallel, as with perform_initialization=False, so it is not "
            "known how tensor parallelism cuts it (Megatron's gradient norms need this too); set "
            "perform_initialization=True, or call set_tensor_model_parallel_attributes on the weight"
        )
    return None
