"""A model in ZeRO partitions over ranks that do not exist, and a step of its optimizer as any of them would take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, FlatJob, Job, Plan, dry_run
from symdist.gradients.nonfinite import FLAGS
from symdist.layouts import Group
from symdist.layouts.flat import flat_bounds, flat_vector
from symdist.param_groups import ParamSpec, describe_member, flat_parts, plan_params, with_defaults
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe
from symdist.routing.route import route
from symdist.tools.models import build
from symdist.tools.simulate import Simulated, simulate

# DeepSpeed pads a group of parameters to a multiple of this, a rank.
_ALIGN = 2


@dataclass(frozen=True, kw_only=True)
class SimulatedFlat(Simulated):
    """A model in ZeRO partitions; of each rank the optimizer is made anew, for each has other matrices whole."""

    stage: int
    bounds: Mapping[str, tuple[int, ...]]
    """Of each parameter, by name: where the ranks' runs of it meet."""
    exchange: ExchangeOptions

    def place_in(self, group: Group, rank: int) -> int:
        """All ranks are in one group, in order."""
        return rank

    def seen_by(self, rank: int) -> tuple[list[ParamSpec], Plan]:
        """The members and the plan of a rank."""
        ranks = Group(ranks=tuple(range(self.ranks)), index=rank)
        members = []
        for i, group in enumerate(self.groups):
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                parts = flat_parts(name, tuple(parameter.shape), group, bounds=self.bounds[name], ranks=ranks)
                for its_name, layout, _ in parts:
                    piece = torch.empty(layout.local_shape, device="meta", requires_grad=True)
                    members.append(describe_member(piece, name=its_name, index=i, group=group, layout=layout))
        return members, plan_params(members, exchange=self.exchange)

    def step(
        self, counting: CountingTransport, *, rank: int = 0, only: set[int] | None = None
    ) -> dict[Group, list[float]]:
        """See `Simulated.step`; in ZeRO all ranks agree on whether gradients are finite, and nothing is in parts."""
        plan = self.plan if rank == 0 else self.seen_by(rank)[1]
        if only is None and self.ranks > 1:
            everyone = Group(ranks=tuple(range(self.ranks)), index=rank)
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=everyone)
        return dry_run(plan, counting, change=lambda job: _of(job, only))


def _of(job: Job | FlatJob, only: set[int] | None) -> FlatJob | None:
    """What of a job is of the parameters `only`."""
    assert isinstance(job, FlatJob)
    if only is None:
        return job
    if not only & set(job.everyone):
        return None
    kept = [i for i, member in enumerate(job.members) if member in only]
    found = dataclasses.replace(
        job,
        members=tuple(job.members[i] for i in kept),
        layouts=tuple(job.layouts[i] for i in kept),
        owners=tuple(job.owners[i] for i in kept) if job.owners else (),
    )
    return None if not kept and (found.strategy == "local" or found.summed) else found


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
    """Partition a model as ZeRO does at a stage, and route it; nothing is materialised.

    Stages 1 and 2 put all parameters of one kind of state and one schedule in one vector, and cut that; stage 3 cuts
    each parameter. `model` is a preset, a TOML file, with further options of `symdist.tools.models.build` in `built`,
    or a module. Raises ValueError for another stage, and for whatever
    `build`, `route` and `SymDist` refuse.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"zero={stage} is not a stage that partitions anything; there are 1, 2 and 3")
    loaded = load_recipe(recipe)
    made = model if isinstance(model, nn.Module) else build(model, device="meta", **(built or {}))
    routed = [with_defaults(group) for group in route(made, loaded)]
    kinds = list(dict.fromkeys(loaded.kind_of(group["role"], group["rule"]) for group in routed))
    # As an engine takes them: one vector after another.
    groups = sorted(routed, key=lambda group: kinds.index(loaded.kind_of(group["role"], group["rule"])))
    found = SimulatedFlat(
        model=made,
        mesh={"zero": ranks},
        groups=groups,
        members=[],
        plan=Plan(local=[], waves=[]),
        stage=stage,
        bounds=_bounds(made, groups, loaded, stage=stage, ranks=ranks),
        exchange=ExchangeOptions.of(exchange),
    )
    members, plan = found.seen_by(0)
    yield dataclasses.replace(found, members=members, plan=plan)


def simulate_on(
    model: str | Path, recipe: RecipeLike, *, mesh: Mapping[str, int], zero: int | None, **options: Any
) -> AbstractContextManager[Simulated]:
    """`simulate` on a mesh, or with `zero` `simulate_flat` at that stage, over a mesh of `dp_shard` alone."""
    if zero is None:
        return simulate(model, recipe, mesh=mesh, **options)
    if set(mesh) != {"dp_shard"}:
        raise ValueError(f"ZeRO partitions over data parallelism alone: mesh is {dict(mesh)}, give dp=… only")
    return simulate_flat(model, recipe, stage=zero, ranks=mesh["dp_shard"], **options)


def _bounds(
    model: nn.Module, groups: list[dict[str, Any]], recipe: Recipe, *, stage: int, ranks: int
) -> dict[str, tuple[int, ...]]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if stage == 3:
        return {name: flat_bounds(0, size, part=-(-size // ranks), ranks=ranks) for name, size in sizes.items()}
    kind = {name: recipe.kind_of(group["role"], group["rule"]) for group in groups for name in group["param_names"]}
    bounds: dict[str, tuple[int, ...]] = {}
    for each in dict.fromkeys(kind.values()):
        names = [name for name in sizes if kind.get(name) == each]
        found = flat_vector([sizes[name] for name in names], ranks=ranks, align=_ALIGN)
        bounds.update(zip(names, found, strict=True))
    return bounds
