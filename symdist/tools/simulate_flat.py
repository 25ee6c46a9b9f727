"""Simulates a model in ZeRO partitions over ranks which do not exist, and a step of its optimizer on any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, Plan, dry_run
from symdist.gradients.nonfinite import FLAGS
from symdist.layouts import Group
from symdist.layouts.flat import flat_bounds, flat_vector
from symdist.param_groups import with_defaults
from symdist.param_specs import ParamSpec, describe_param, flat_parts
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe
from symdist.routing.route import route
from symdist.step_plan import plan_params
from symdist.tools.models import build
from symdist.tools.simulate import Simulated, simulate

# DeepSpeed pads a group of parameters to a multiple of this number times the number of ranks.
_ALIGN = 2


@dataclass(frozen=True, kw_only=True)
class SimulatedFlat(Simulated):
    """A model in ZeRO partitions.

    The plan is made anew for each rank, since each has other matrices whole.

    Attributes:
        stage: The ZeRO stage: 1, 2 or 3.
        bounds: By name of parameter, the indices at which one rank's run of its elements ends and the next begins.
        exchange: How matrices travel between ranks.
    """

    stage: int
    bounds: Mapping[str, tuple[int, ...]]
    exchange: ExchangeOptions

    def place_in(self, group: Group, rank: int) -> int:
        """Return the index of a rank in a group: all ranks are in one group, in order."""
        return rank

    def on_rank(self, rank: int) -> tuple[list[ParamSpec], Plan]:
        """Return the members and the plan of the optimizer on a rank.

        Args:
            rank: The rank.

        Returns:
            The descriptions of its parameters, and its plan.
        """
        ranks = Group(ranks=tuple(range(self.ranks)), index=rank)
        members = []
        for i, group in enumerate(self.groups):
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                parts = flat_parts(name, tuple(parameter.shape), group, bounds=self.bounds[name], ranks=ranks)
                for part_name, layout, _ in parts:
                    piece = torch.empty(layout.local_shape, device="meta", requires_grad=True)
                    members.append(describe_param(piece, name=part_name, index=i, group=group, layout=layout))
        return members, plan_params(members, exchange=self.exchange)

    def step(
        self, counting: CountingTransport, *, rank: int = 0, only: set[int] | None = None
    ) -> dict[Group, list[float]]:
        """Run the jobs of a step on meta tensors, as one rank would run them; see `Simulated.step`.

        Args:
            counting: Records what the rank sends.
            rank: The rank; 0 by default.
            only: The indices of the members to step; None (default) for all.

        Returns:
            The operations of every rank, by group.
        """
        plan = self.plan if rank == 0 else self.on_rank(rank)[1]
        if only is None and self.ranks > 1:
            everyone = Group(ranks=tuple(range(self.ranks)), index=rank)
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=everyone)
        return dry_run(plan, counting, change=lambda job: job if only is None else job.only(only))


@contextmanager
def simulate_flat(
    model: str | Path | nn.Module,
    recipe: RecipeLike,
    *,
    stage: int,
    ranks: int,
    built: Mapping[str, Any] | None = None,
    exchange: ExchangeLike = None,
) -> Iterator[SimulatedFlat]:
    """Partition a model as a ZeRO stage does, and route it, without creating weights.

    Stages 1 and 2 join all parameters with the same number of state tensors and the same schedule into one vector, and
    divide that. Stage 3 divides each parameter.

    Args:
        model: A preset, the path of a TOML file (see `symdist.tools.models.build`), or a module.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        stage: The ZeRO stage: 1, 2 or 3.
        ranks: The number of ranks.
        built: Further keyword arguments of `symdist.tools.models.build`. None by default.
        exchange: How matrices travel between ranks: `ExchangeOptions` or a mapping of its keys. None for the defaults.

    Yields:
        The simulated model.

    Raises:
        ValueError: For another stage, or if `build`, `route` or `SymDist` would refuse the model or recipe.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"zero={stage} must be a ZeRO stage that partitions something: 1, 2 or 3")
    loaded = load_recipe(recipe)
    module = model if isinstance(model, nn.Module) else build(model, device="meta", **(built or {}))
    routed = [with_defaults(group) for group in route(module, loaded)]
    kinds = list(dict.fromkeys(loaded.kind_of(group["role"], group["rule"]) for group in routed))
    # Sort the groups as an engine does: one vector after another.
    groups = sorted(routed, key=lambda group: kinds.index(loaded.kind_of(group["role"], group["rule"])))
    simulated = SimulatedFlat(
        model=module,
        mesh={"zero": ranks},
        groups=groups,
        members=[],
        plan=Plan(local=[], waves=[]),
        stage=stage,
        bounds=_bounds(module, groups, loaded, stage=stage, ranks=ranks),
        exchange=ExchangeOptions.of(exchange),
    )
    members, plan = simulated.on_rank(0)
    yield dataclasses.replace(simulated, members=members, plan=plan)


def simulate_on(
    model: str | Path, recipe: RecipeLike, *, mesh: Mapping[str, int], zero: int | None, **options: Any
) -> AbstractContextManager[Simulated]:
    """Simulate a model on a mesh, or in the partitions of a ZeRO stage.

    Args:
        model: A preset, or the path of a TOML file; see `symdist.tools.models.build`.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        mesh: The sizes by name of mesh dimension; with `zero`, of `dp_shard` only.
        zero: A ZeRO stage, or None for FSDP2 shards.
        **options: Further options of `simulate` or `simulate_flat`.

    Returns:
        The context of `simulate` or `simulate_flat`.

    Raises:
        ValueError: If `zero` is given with other mesh dimensions.
    """
    if zero is None:
        return simulate(model, recipe, mesh=mesh, **options)
    if set(mesh) != {"dp_shard"}:
        raise ValueError(
            f"zero={zero}: ZeRO partitions over data-parallel ranks only, but mesh is {dict(mesh)}; give dp=… only"
        )
    return simulate_flat(model, recipe, stage=zero, ranks=mesh["dp_shard"], **options)


def _bounds(
    model: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, *, stage: int, ranks: int
) -> dict[str, tuple[int, ...]]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if stage == 3:
        return {name: flat_bounds(0, size, part=-(-size // ranks), ranks=ranks) for name, size in sizes.items()}
    kind = {name: recipe.kind_of(group["role"], group["rule"]) for group in groups for name in group["param_names"]}
    bounds: dict[str, tuple[int, ...]] = {}
    for vector in dict.fromkeys(kind.values()):
        names = [name for name in sizes if kind.get(name) == vector]
        vector_bounds = flat_vector([sizes[name] for name in names], ranks=ranks, align=_ALIGN)
        bounds.update(zip(names, vector_bounds, strict=True))
    return bounds
