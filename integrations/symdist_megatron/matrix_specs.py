"""Describe the matrices that each parameter of a Megatron model consists of, and how ranks hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from symdist.routing.facts import ModuleChain
from symdist.routing.fused_weights import MatrixSpec, Sections, matrices_of
from symdist.routing.param_site import ParamSite
from symdist.routing.recipes import Recipe
from symdist.routing.sites import walk
from symdist_megatron.rank_grids import RankGrids
from symdist_megatron.sites import global_name, in_experts, is_vocabulary, megatron_site, sections_of, stacks_experts


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
    cut, opaque = None, False
    if ranks > 1 and parameter.dim() == 2:
        cut = _cut(name, parameter, site, holder, expert=expert)
        opaque = cut is not None and site.fused is None and getattr(parameter, "partition_stride", 1) != 1
    elif ranks > 1:
        # Vectors and convolutions of mixers say that they are cut, but not how.
        opaque = bool(getattr(parameter, "tensor_model_parallel", False))
    if opaque:
        cut = None
    names, shape = [name], tuple(parameter.shape)
    if stacks_experts(holder):
        count, hidden = holder.num_local_experts, holder.config.hidden_size
        names = [f"{name}[{rank_grids.expert_rank * count + i}]" for i in range(count)]
        inner = parameter.numel() // count // hidden
        shape = (inner, hidden) if site.role == "expert_down" else (hidden, inner)
    sections = Sections()
    if len(shape) == 2 and not opaque:
        sections = sections_of(site, shape, chain, ranks=1 if cut is None else ranks)
    return tuple(
        matrices_of(
            names,
            shape,
            site,
            sections=sections,
            cut=cut,
            ranks=ranks,
            recipe=recipe,
            vocabulary=is_vocabulary(chain),
            opaque=opaque,
        )
    )


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
