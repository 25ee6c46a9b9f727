"""A model sharded over ranks that do not exist, and a step of its optimizer as any of them would take it."""

from __future__ import annotations

import bisect
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, FlatJob, Job, Plan, dry_run
from symdist.gradients.nonfinite import FLAGS, ranks_that_agree
from symdist.layouts import Group, Layout
from symdist.param_groups import ParamSpec, describe_member, plan_params, with_defaults
from symdist.routing.recipes import RecipeLike
from symdist.routing.route import route
from symdist.tools.models import build, shard


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A model on a mesh of which this process is rank 0; `members` and `plan` are those of its optimizer."""

    model: nn.Module
    mesh: Mapping[str, int]
    groups: list[dict[str, Any]]
    members: list[ParamSpec]
    plan: Plan
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict, repr=False)
    _sets: dict[tuple[int, ...], frozenset[int]] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(self.mesh.values())

    def layout(self, layout: Layout, rank: int) -> Layout:
        """A layout as another rank of the mesh sees its own piece: a sibling of rank 0's, at the rank's coordinates."""
        if layout.group is None:
            return layout
        key = id(layout), rank
        if key not in self._layouts:
            # Those of one rank at a time: many jobs share a layout, and large ones are slow to make.
            if any(other != rank for _, other in self._layouts):
                self._layouts.clear()
            self._layouts[key] = layout.at(self.place_in(layout.group, rank))
        return self._layouts[key]

    def place_in(self, group: Group, rank: int) -> int:
        """The place of a rank in its own sibling of a group of rank 0."""
        along, stride = rank, self.ranks
        here = 0
        for size in self.mesh.values():
            stride //= size
            coordinate, along = divmod(along, stride)
            # The axes that rank 0's group runs along: it has the next rank of them.
            if size > 1 and stride in self._members_of(group):
                here += coordinate * stride
        return bisect.bisect_left(group.ranks, here)

    def _members_of(self, group: Group) -> frozenset[int]:
        return self._sets.setdefault(group.ranks, frozenset(group.ranks))

    def step(
        self, counting: CountingTransport, *, rank: int = 0, only: set[int] | None = None
    ) -> dict[Group, list[float]]:
        """Run the jobs of a step, of the parameters `only`, on meta tensors, as `rank` would; `counting` notes it.

        All the arithmetic and every collective of `SymDist.step`, but for what costs nothing elsewhere: gradients are
        taken for directions, and no weight is written. Returned are the operations that all ranks do, by group.
        """
        parameters = [member.parameter for member in self.members]
        world = ranks_that_agree(parameters, [])
        if only is None and world is not None and world.size > 1:
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=world)
        return dry_run(self.plan, counting, change=lambda job: self._of(job, rank, only))

    def _of(self, job: Job | FlatJob, rank: int, only: set[int] | None) -> Job | None:
        """What of a job is of the parameters `only`, as a rank sees it."""
        assert isinstance(job, Job), "DTensors alone are simulated"
        kept = [i for i, member in enumerate(job.members) if only is None or member in only]
        if not kept:
            return None
        units = len(job.owners) // len(job.members)
        return dataclasses.replace(
            job,
            stack=dataclasses.replace(job.stack, layout=self.layout(job.stack.layout, rank)),
            members=tuple(job.members[i] for i in kept),
            owners=tuple(owner for i in kept for owner in job.owners[i * units : (i + 1) * units]),
            stages=tuple(job.stages[i] for i in kept) if job.stages else (),
        )


@contextmanager
def simulate(
    model: str | Path,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int],
    built: Mapping[str, Any] | None = None,
    exchange: ExchangeLike = None,
) -> Iterator[Simulated]:
    """Shard a model over a mesh, as `symdist.tools.models.shard` does, and route it; nothing is materialised.

    `model` is a preset or a TOML file, see `symdist.tools.models.build`, of which `built` has further options; `mesh`
    maps names of mesh dimensions to sizes. No process group may be open, and one is until the context ends. Raises
    ValueError for whatever `build`, `shard`, `route` and `SymDist` refuse.
    """
    # Not public, but the only process group that has a size and no peers.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = math.prod(mesh.values())
    # Opening a group replaces what shows uncaught errors; closing it does not put that back.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        grid = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        sharded = shard(build(model, device="meta", **(built or {})), grid, layouts_only=True)
        groups = [with_defaults(group) for group in route(sharded, recipe)]
        members = [
            describe_member(parameter, name=name, index=i, group=group)
            for i, group in enumerate(groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        plan = plan_params(members, exchange=ExchangeOptions.of(exchange))
        yield Simulated(model=sharded, mesh=dict(mesh), groups=groups, members=members, plan=plan)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
