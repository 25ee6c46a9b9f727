"""Simulates a model on ranks which do not exist, and a step of its optimizer on any of them."""

from __future__ import annotations

import bisect
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, Plan, dry_run
from symdist.gradients.nonfinite import FLAGS, share
from symdist.layouts import FlatLayout, Group, Layout, layout_of
from symdist.layouts.flat import flat_bounds, flat_vector
from symdist.param_groups import with_defaults
from symdist.param_specs import ParamSpec, describe_param, flat_parts
from symdist.routing.recipes import RecipeLike, load_recipe
from symdist.routing.route import route
from symdist.step_plan import plan_params
from symdist.tools.megatron import MegatronMesh, megatron_weights
from symdist.tools.models import build, shard
from symdist.tools.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# DeepSpeed pads a group of parameters to a multiple of this number times the number of ranks.
_ALIGN = 2
# Every rank takes memory and time.
_MOST_RANKS = 2**15


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A model on ranks that do not exist.

    Attributes:
        model: The model, on the meta device.
        mesh: The sizes by name of mesh dimension, along which all groups lie. Ranks are numbered in row-major order.
        parallel: The sizes by the names that users of the engine know.
        groups: The param groups, with all options filled in.
        weights: What the optimizer's parameters are, on any rank.
        exchange: How matrices travel between ranks.
    """

    model: nn.Module
    mesh: Mapping[str, int]
    parallel: Mapping[str, int]
    groups: list[dict[str, Any]]
    weights: Sequence[Weight]
    exchange: ExchangeOptions
    _plans: dict[int, Plan] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return math.prod(self.mesh.values())

    @functools.cached_property
    def members(self) -> list[ParamSpec]:
        """What the rules step one by one on rank 0: parameters, and sections of these."""
        return self.specs(0)

    @functools.cached_property
    def plan(self) -> Plan:
        """The optimizer's plan on rank 0."""
        return plan_params(self.members, exchange=self.exchange)

    def specs(self, rank: int) -> list[ParamSpec]:
        """Describe what the rules step one by one on a rank: the optimizer's parameters, and sections of these.

        Args:
            rank: The rank.

        Returns:
            The descriptions, in the order of the plan's indices.
        """
        return [member for _, spec in self._described(rank) for member in spec.members]

    def _described(self, rank: int) -> Iterator[tuple[Weight, ParamSpec]]:
        for weight in self.weights:
            layout = weight.layout(rank)
            if layout is not None:
                piece = torch.empty(layout.local_shape, device="meta", requires_grad=True)
                group = self.groups[weight.group]
                yield (
                    weight,
                    describe_param(piece, name=weight.name, index=weight.group, group=group, layout=layout),
                )

    def on_rank(self, rank: int) -> Plan:
        """Return the optimizer's plan on a rank.

        Args:
            rank: The rank.

        Returns:
            The plan.
        """
        if rank == 0:
            return self.plan
        if rank not in self._plans:
            # Those of one rank at a time, since plans for thousands of ranks are large.
            self._plans.clear()
            self._plans[rank] = plan_params(self.specs(rank), exchange=self.exchange)
        return self._plans[rank]

    def step(
        self, counting: CountingTransport, *, rank: int = 0, only: set[int] | None = None
    ) -> dict[Group, list[float]]:
        """Run the jobs of a step on meta tensors, as one rank would run them.

        All arithmetic and all collectives of `SymDist.step` run, except that gradients are used as the directions and
        no weight is written.

        Args:
            counting: Records what the rank sends.
            rank: The rank; 0 by default.
            only: The indices in `specs` of what to step; None (default) for all.

        Returns:
            The operations of every rank, by group.
        """
        if only is None:
            everyone = Group(ranks=tuple(range(self.ranks)), index=rank)
            share(torch.empty(FLAGS, device="meta"), everyone, counting)
        plan = self.on_rank(rank)
        work = dry_run(plan, counting, change=lambda job: job if only is None else job.only(only))
        strategies = plan.strategies()
        if not any(weight.copies for weight in self.weights):
            return work
        held = [(weight, member.layout) for weight, spec in self._described(rank) for member in spec.members]
        for i, (weight, layout) in enumerate(held):
            if weight.copies is not None and strategies.get(i, "local") != "local" and (only is None or i in only):
                # Sums on several stages may differ in the last digit, so the first stage sends its copy.
                counting.broadcast(torch.empty(layout.local_shape, device="meta"), group=weight.copies(rank))
        return work

    def work(self) -> list[float]:
        """Return the operations of every rank in a step.

        Ranks that differ only in their position within groups of the same form share them.
        """
        work = [0.0] * self.ranks
        stage = self.ranks // self.mesh.get("pp", 1)
        for first in range(0, self.ranks, stage):
            # What a team does counts for its members already, roots included.
            teams = {job.stack.layout.shard_group for job in self.on_rank(first).jobs if job.team}
            for group, loads in self.step(CountingTransport(), rank=first).items():
                if group in teams:
                    continue
                for rank in range(first, first + stage):
                    work[rank] += loads[self.place_in(group, rank)]
        return work

    def place_in(self, group: Group, rank: int) -> int:
        """Return the index of a rank in its own group that corresponds to another rank's group.

        Args:
            group: A group that begins at the first rank of a pipeline stage.
            rank: A rank of that stage.

        Returns:
            The index. The rank's group runs along the same mesh dimensions as `group`.
        """
        return _place_in(group.ranks, rank, tuple(self.mesh.values()))


def _place_in(ranks: tuple[int, ...], rank: int, sizes: tuple[int, ...]) -> int:
    members = _as_set(ranks)
    first = place = ranks[0]
    remainder, stride = rank, math.prod(sizes)
    for size in sizes:
        stride //= size
        coordinate, remainder = divmod(remainder, stride)
        # The group extends along this dimension if it contains the next rank in it.
        if size > 1 and first + stride in members:
            place += coordinate * stride
    return bisect.bisect_left(ranks, place)


@functools.lru_cache(maxsize=64)
def _as_set(ranks: tuple[int, ...]) -> frozenset[int]:
    return frozenset(ranks)


@contextmanager
def simulate(
    model: str | Path | nn.Module,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int] | MegatronMesh,
    zero: int | None = None,
    built: Mapping[str, Any] | None = None,
    exchange: ExchangeLike = None,
) -> Iterator[Simulated]:
    """Place a model on ranks and route it, without creating weights.

    For a mesh of FSDP2, tensor and expert parallelism, no process group may be open in this process; a fake one is open
    until the context ends.

    Args:
        model: A preset, the path of a TOML file (see `symdist.tools.models.build`), or a module on the meta device.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        mesh: The sizes by name of mesh dimension, see `symdist.tools.models.shard`; or the ranks of a Megatron job.
        zero: A ZeRO stage (1, 2 or 3), whose partitions then hold the weights; the mesh has `dp_shard` only. None
            (default) for FSDP2's shards.
        built: Further keyword arguments of `symdist.tools.models.build`. None by default.
        exchange: How matrices travel between ranks: `ExchangeOptions` or a mapping of its keys. None for the defaults.

    Yields:
        The simulated model.

    Raises:
        ValueError: If `build`, `shard`, `route` or `SymDist` would refuse the model, recipe or mesh, or for another
            ZeRO stage or a stage with other mesh dimensions.

    Example:
        >>> counting = CountingTransport()
        >>> with simulate("olmoe-tiny", "small-moe", mesh={"dp_shard": 64}) as simulated:
        ...     simulated.step(counting, rank=63)
        >>> counting.collectives, counting.sent
    """
    ranks = math.prod((mesh.sizes if isinstance(mesh, MegatronMesh) else mesh).values())
    if not 1 <= ranks <= _MOST_RANKS:
        raise ValueError(f"the mesh has {ranks:,} ranks; give sizes from 1 whose product is at most {_MOST_RANKS:,}")
    module = model if isinstance(model, nn.Module) else build(model, device="meta", **(built or {}))
    placed = functools.partial(Simulated, model=module, exchange=ExchangeOptions.of(exchange))
    if isinstance(mesh, MegatronMesh):
        groups, weights = megatron_weights(module, load_recipe(recipe), mesh)
        yield placed(mesh=mesh.sizes, parallel=mesh.title, groups=groups, weights=weights)
    elif zero is not None:
        groups, weights = _zero_weights(module, recipe, stage=zero, mesh=mesh)
        yield placed(mesh=mesh, parallel={f"ZeRO-{zero}": mesh["dp_shard"]}, groups=groups, weights=weights)
    else:
        with _fake_ranks(ranks):
            grid = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
            sharded = shard(cast("PreTrainedModel", module), grid, layouts_only=True)
            groups = [with_defaults(group) for group in route(sharded, recipe)]
            weights = _mesh_weights(groups, tuple(mesh.values()))
            yield placed(mesh=mesh, parallel=mesh, groups=groups, weights=weights)


@contextmanager
def _fake_ranks(ranks: int) -> Iterator[None]:
    # Not a public class, but only this process group has a size without other processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Opening a process group replaces sys.excepthook, and closing it does not restore it.
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _mesh_weights(groups: Sequence[Mapping[str, Any]], sizes: tuple[int, ...]) -> list[Weight]:
    """Return the weights of groups of DTensors, and of plain tensors that every rank has."""

    @functools.lru_cache(maxsize=64)
    def at(layout: Layout | FlatLayout, rank: int) -> Layout | FlatLayout:
        return layout if layout.group is None else layout.at(_place_in(layout.group.ranks, rank, sizes))

    weights = []
    for i, group in enumerate(groups):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            layout = functools.partial(at, layout_of(parameter, name=name))
            weights.append(Weight(name=name, group=i, layout=layout))
    return weights


def _zero_weights(
    module: nn.Module, recipe: RecipeLike, *, stage: int, mesh: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[Weight]]:
    """Return the param groups and weights of a model in ZeRO partitions.

    Stages 1 and 2 join all parameters with the same number of state tensors and the same schedule into one vector, and
    divide that. Stage 3 divides each parameter.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"zero={stage} must be a ZeRO stage that partitions something: 1, 2 or 3")
    if set(mesh) != {"dp_shard"}:
        raise ValueError(
            f"zero={stage}: ZeRO partitions over data-parallel ranks only, but mesh is {dict(mesh)}; give dp=… only"
        )
    ranks = mesh["dp_shard"]
    loaded = load_recipe(recipe)
    routed = [with_defaults(group) for group in route(module, loaded)]
    kinds = [loaded.kind_of(group["role"], group["rule"]) for group in routed]
    order = list(dict.fromkeys(kinds))
    # Sort the groups as an engine does: one vector after another.
    groups = [group for kind in order for group, of_group in zip(routed, kinds, strict=True) if of_group == kind]
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    if stage == 3:
        bounds = {name: flat_bounds(0, size, part=-(-size // ranks), ranks=ranks) for name, size in sizes.items()}
    else:
        bounds = {}
        for kind in order:
            of_kind = {name for g, k in zip(routed, kinds, strict=True) if k == kind for name in g["param_names"]}
            names = [name for name in sizes if name in of_kind]
            vector = flat_vector([sizes[name] for name in names], ranks=ranks, align=_ALIGN)
            bounds.update(zip(names, vector, strict=True))
    weights = []
    for i, group in enumerate(groups):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            everyone = Group(ranks=tuple(range(ranks)), index=0)
            for part, layout, _ in flat_parts(name, tuple(parameter.shape), group, bounds=bounds[name], ranks=everyone):
                weights.append(Weight(name=part, group=i, layout=layout.at))
    return groups, weights
