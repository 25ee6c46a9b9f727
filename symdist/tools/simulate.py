"""Simulates a model that is sharded over ranks which do not exist, and a step of its optimizer on any of them."""

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

from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, Job, Plan, dry_run
from symdist.gradients.nonfinite import FLAGS, ranks_that_agree
from symdist.layouts import Group, Layout
from symdist.param_groups import with_defaults
from symdist.param_specs import ParamSpec, describe_param
from symdist.routing.recipes import RecipeLike
from symdist.routing.route import route
from symdist.step_plan import plan_params
from symdist.tools.models import build, shard


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A model on a mesh, of which this process is rank 0.

    Attributes:
        model: The model, on the meta device.
        mesh: The sizes by name of mesh dimension.
        groups: The param groups, with all options filled in.
        members: The descriptions of the optimizer's parameters.
        plan: The optimizer's plan on rank 0.
    """

    model: nn.Module
    mesh: Mapping[str, int]
    groups: list[dict[str, Any]]
    members: list[ParamSpec]
    plan: Plan
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict, repr=False)
    _sets: dict[tuple[int, ...], frozenset[int]] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> int:
        """The number of ranks of the mesh."""
        return math.prod(self.mesh.values())

    def layout(self, layout: Layout, rank: int) -> Layout:
        """Return a layout of rank 0 as another rank sees it, with that rank's own piece.

        Args:
            layout: The layout on rank 0.
            rank: The other rank.

        Returns:
            The layout on the other rank.
        """
        if layout.group is None:
            return layout
        key = id(layout), rank
        if key not in self._layouts:
            # Cache the layouts, since many jobs share one and large ones are slow to make, but of one rank at a time.
            if any(other != rank for _, other in self._layouts):
                self._layouts.clear()
            self._layouts[key] = layout.at(self.place_in(layout.group, rank))
        return self._layouts[key]

    def place_in(self, group: Group, rank: int) -> int:
        """Return the index of a rank in its own group that corresponds to a group of rank 0.

        Args:
            group: A group that contains rank 0.
            rank: The rank.

        Returns:
            The index. The rank's group runs along the same mesh dimensions as `group`.
        """
        remainder, stride = rank, self.ranks
        place = 0
        for size in self.mesh.values():
            stride //= size
            coordinate, remainder = divmod(remainder, stride)
            # Rank 0's group extends along this dimension if it contains the next rank in it.
            if size > 1 and stride in self._members_of(group):
                place += coordinate * stride
        return bisect.bisect_left(group.ranks, place)

    def _members_of(self, group: Group) -> frozenset[int]:
        return self._sets.setdefault(group.ranks, frozenset(group.ranks))

    def step(
        self, counting: CountingTransport, *, rank: int = 0, only: set[int] | None = None
    ) -> dict[Group, list[float]]:
        """Run the jobs of a step on meta tensors, as one rank would run them.

        All arithmetic and all collectives of `SymDist.step` run, except that gradients are used as the directions and
        no weight is written.

        Args:
            counting: Records what the rank sends.
            rank: The rank; 0 by default.
            only: The indices of the members to step; None (default) for all.

        Returns:
            The operations of every rank, by group.
        """
        parameters = [member.parameter for member in self.members]
        world = ranks_that_agree(parameters, [])
        if only is None and world is not None and world.size > 1:
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=world)
        return dry_run(self.plan, counting, change=lambda job: self._of(job, rank, only))

    def _of(self, job: Job, rank: int, only: set[int] | None) -> Job | None:
        """Return the part of a job that belongs to the members `only`, as a rank sees it; None if there is none."""
        part = job if only is None else job.only(only)
        if part is None:
            return None
        layout = self.layout(part.stack.layout, rank)
        stack = dataclasses.replace(part.stack, layout=layout)
        return dataclasses.replace(part, stack=stack, layouts=(layout,) * len(part.members))


@contextmanager
def simulate(
    model: str | Path,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int],
    built: Mapping[str, Any] | None = None,
    exchange: ExchangeLike = None,
) -> Iterator[Simulated]:
    """Shard a model over a mesh and route it, without creating weights.

    No process group may be open in this process. A fake one is open until the context ends.

    Args:
        model: A preset, or the path of a TOML file; see `symdist.tools.models.build`.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        mesh: The sizes by name of mesh dimension; see `symdist.tools.models.shard`.
        built: Further keyword arguments of `symdist.tools.models.build`. None by default.
        exchange: How matrices travel between ranks: `ExchangeOptions` or a mapping of its keys. None for the defaults.

    Yields:
        The simulated model.

    Raises:
        ValueError: If `build`, `shard`, `route` or `SymDist` would refuse the model, recipe or mesh.

    Example:
        >>> counting = CountingTransport()
        >>> with simulate("olmoe-tiny", "small-moe", mesh={"dp_shard": 64}) as simulated:
        ...     simulated.step(counting, rank=63)
        >>> counting.collectives, counting.sent
    """
    # Not a public class, but only this process group has a size without other processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = math.prod(mesh.values())
    # Opening a process group replaces sys.excepthook, and closing it does not restore it.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        grid = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        sharded = shard(build(model, device="meta", **(built or {})), grid, layouts_only=True)
        groups = [with_defaults(group) for group in route(sharded, recipe)]
        members = [
            describe_param(parameter, name=name, index=i, group=group)
            for i, group in enumerate(groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        plan = plan_params(members, exchange=ExchangeOptions.of(exchange))
        yield Simulated(model=sharded, mesh=dict(mesh), groups=groups, members=members, plan=plan)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
