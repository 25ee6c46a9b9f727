"""Assign rules to a Megatron model's matrices: roles from modules, options from the recipe, agreed by all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from symdist.engines.agreement import gather_unless_failed
from symdist.param_groups import with_defaults
from symdist.param_specs import coordinate_wise
from symdist.routing.fused_weights import MatrixSpec
from symdist.routing.route import check_patterns, route_sites
from symdist_megatron.matrix_specs import ParamSpec, describe
from symdist_megatron.options import Options, Scaled, scaled
from symdist_megatron.rank_grids import RankGrids

_VOCABULARIES = ("embedding", "tied_embedding", "head")


@dataclass(frozen=True, kw_only=True)
class UnitAssignment:
    """A matrix or vector with the options of its rule.

    Attributes:
        unit: The matrix or vector.
        options: The options of its rule, without learning rate and weight decay. Units with equal options share one
            dict.
        lr_ratio: Its learning rate as a multiple of its Megatron group's.
        decay_ratio: Its weight decay as a multiple of its Megatron group's; None if Megatron's config has no weight
            decay.
        decay: Its weight decay, used if `decay_ratio` is None.
    """

    unit: MatrixSpec
    options: Mapping[str, Any]
    lr_ratio: float
    decay_ratio: float | None
    decay: float


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The descriptions and assignments of a rank's parameters.

    Attributes:
        described: The description of each model parameter, by the parameter's `id`.
        routed: The assignments of each model parameter's matrices and vectors, by the parameter's `id`.
        rules: The rule of each role, of the roles on all ranks.
        scaled: The scaled recipe.
    """

    described: Mapping[int, ParamSpec]
    routed: Mapping[int, tuple[UnitAssignment, ...]]
    rules: Mapping[str, str]
    scaled: Scaled


def route_model(chunks: Sequence[nn.Module], options: Options, config: Any, *, rank_grids: RankGrids) -> Routing:
    """Assign rules to the parameters of this rank's model chunks; all ranks must call it.

    Args:
        chunks: This rank's model chunks.
        options: The user's options.
        config: Megatron's `OptimizerConfig`.
        rank_grids: The ranks that hold dense parameters and experts.

    Returns:
        The routing.

    Raises:
        ValueError: On every rank, for anything that `symdist.route` refuses on any. The message names the parameter.
    """
    failure: str | None = None
    used_patterns: set[int] = set()
    rules: dict[str, str] = {}
    described: list[ParamSpec] = []
    routed: dict[int, tuple[UnitAssignment, ...]] = {}
    scaled_recipe = scaled(options, config)
    try:
        described = describe(chunks, rank_grids=rank_grids, recipe=scaled_recipe.recipe)
        routed, rules = _route(described, options, scaled_recipe, used_patterns)
    except ValueError as error:
        failure = str(error)
    by_rank = gather_unless_failed((used_patterns, [spec.name for spec in described][:3], rules), failure)
    all_rules = {role: rule for _, _, rank_rules in by_rank for role, rule in rank_rules.items()}
    all_patterns = set().union(*(rank_patterns for rank_patterns, _, _ in by_rank))
    check_patterns(scaled_recipe.recipe, all_patterns, [name for _, names, _ in by_rank for name in names])
    return Routing(
        described={id(spec.parameter): spec for spec in described},
        routed=routed,
        rules=dict(sorted(all_rules.items())),
        scaled=scaled_recipe,
    )


def _route(
    described: Sequence[ParamSpec], options: Options, scaled_recipe: Scaled, used_patterns: set[int]
) -> tuple[dict[int, tuple[UnitAssignment, ...]], dict[str, str]]:
    """Return the assignments by `id` of the parameter, and the rule of each role on this rank."""
    sites = {unit.name: (unit, unit.site) for spec in described for unit in spec.units}
    by_name: dict[str, UnitAssignment] = {}
    rules: dict[str, str] = {}
    for group in route_sites(sites, scaled_recipe.recipe, used_patterns=used_patterns):
        for padding, units in _by_padding(group, options.vocabulary).items():
            param_group = {**group, "params": units, "param_names": [unit.name for unit in units]}
            if padding:
                param_group["padding_rows"] = padding
            param_group = with_defaults(param_group)
            rules[group["role"]] = param_group["rule"]
            decay = float(param_group["weight_decay"])
            rule_options = {
                key: value
                for key, value in param_group.items()
                if key not in ("params", "param_names", "lr", "weight_decay")
            }
            opaque = [unit.name for unit in units if unit.opaque and not coordinate_wise(param_group)]
            if opaque:
                raise ValueError(
                    f"{opaque[0]}: tensor parallelism cuts it, and it is not known how (it is no matrix, or its "
                    "partition_stride is not 1); give it a coordinate-wise rule, such as adamw, in a pattern, or turn "
                    "tensor parallelism off"
                )
            for unit in units:
                by_name[unit.name] = UnitAssignment(
                    unit=unit,
                    options=rule_options,
                    lr_ratio=float(param_group["lr"]) / scaled_recipe.lr,
                    decay_ratio=decay / scaled_recipe.weight_decay if scaled_recipe.weight_decay else None,
                    decay=decay,
                )
    return {id(spec.parameter): tuple(by_name[unit.name] for unit in spec.units) for spec in described}, rules


def _by_padding(group: Mapping[str, Any], vocabulary: int | None) -> dict[int, list[MatrixSpec]]:
    """Sort the units of a group by how many of their rows only pad the vocabulary."""
    by_padding: dict[int, list[MatrixSpec]] = {}
    for unit in group["params"]:
        padding = 0
        if vocabulary is not None and group["role"] in _VOCABULARIES and unit.vocabulary:
            padding = unit.shape[0] - vocabulary
            if padding < 0:
                raise ValueError(
                    f"{unit.name} has {unit.shape[0]} rows, fewer than the vocabulary of {vocabulary}; correct "
                    "vocabulary (--symdist-vocabulary), the number of real tokens"
                )
        by_padding.setdefault(padding, []).append(unit)
    return by_padding
