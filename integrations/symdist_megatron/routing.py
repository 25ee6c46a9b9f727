"""Assigns rules to a Megatron model's matrices: roles from modules, options from the recipe, agreed by all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from symdist.engines.agreement import gather_unless_failed
from symdist.param_groups import coordinate_wise, with_defaults
from symdist.routing.route import check_patterns, route_sites
from symdist_megatron.options import Options, Scaled, scaled
from symdist_megatron.parameters import MatrixSpec, ParamSpec, describe
from symdist_megatron.rank_grid import RankGrids

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
    """What the parameters of a rank are, and what they were assigned.

    Attributes:
        described: By `id` of a model parameter, its description.
        routed: By `id` of a model parameter, the assignments of its matrices and vectors.
        rules: The rule of every role on any rank.
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
    taken: set[int] = set()
    rules: dict[str, str] = {}
    described: list[ParamSpec] = []
    routed: dict[int, tuple[UnitAssignment, ...]] = {}
    proportion = scaled(options, config)
    try:
        described = describe(chunks, rank_grids=rank_grids, recipe=proportion.recipe)
        routed, rules = _route(described, options, proportion, taken)
    except ValueError as error:
        failure = str(error)
    found = gather_unless_failed((taken, [each.name for each in described][:3], rules), failure)
    every = {role: rule for _, _, of_rank in found for role, rule in of_rank.items()}
    used = set().union(*(of_rank for of_rank, _, _ in found))
    check_patterns(proportion.recipe, used, [name for _, names, _ in found for name in names])
    return Routing(
        described={id(each.parameter): each for each in described},
        routed=routed,
        rules=dict(sorted(every.items())),
        scaled=proportion,
    )


def _route(
    described: Sequence[ParamSpec], options: Options, proportion: Scaled, taken: set[int]
) -> tuple[dict[int, tuple[UnitAssignment, ...]], dict[str, str]]:
    sites = {unit.name: (unit, unit.site) for each in described for unit in each.units}
    by_name: dict[str, UnitAssignment] = {}
    rules: dict[str, str] = {}
    for group in route_sites(sites, proportion.recipe, taken=taken):
        for padding, units in _by_padding(group, options.vocabulary).items():
            own = {**group, "params": units, "param_names": [unit.name for unit in units]}
            if padding:
                own["padding_rows"] = padding
            full = with_defaults(own)
            rules[group["role"]] = full["rule"]
            decay = float(full["weight_decay"])
            told = {
                key: value for key, value in full.items() if key not in ("params", "param_names", "lr", "weight_decay")
            }
            torn = [unit.name for unit in units if unit.opaque and not coordinate_wise(full)]
            if torn:
                raise ValueError(
                    f"{torn[0]} is in several shards on each tensor-parallel rank, and its module does not say what "
                    "they are; name a coordinate-wise rule for it, such as adamw, or run it without tensor parallelism"
                )
            for unit in units:
                by_name[unit.name] = UnitAssignment(
                    unit=unit,
                    options=told,
                    lr_ratio=float(full["lr"]) / proportion.lr,
                    decay_ratio=decay / proportion.weight_decay if proportion.weight_decay else None,
                    decay=decay,
                )
    return {id(each.parameter): tuple(by_name[unit.name] for unit in each.units) for each in described}, rules


def _by_padding(group: Mapping[str, Any], vocabulary: int | None) -> dict[int, list[MatrixSpec]]:
    """Sort the units of a group by how many of their rows only pad the vocabulary."""
    found: dict[int, list[MatrixSpec]] = {}
    for unit in group["params"]:
        over = 0
        if vocabulary is not None and group["role"] in _VOCABULARIES and unit.vocabulary:
            over = unit.shape[0] - vocabulary
            if over < 0:
                raise ValueError(f"{unit.name} has {unit.shape[0]} rows, fewer than the vocabulary of {vocabulary}")
        found.setdefault(over, []).append(unit)
    return found
