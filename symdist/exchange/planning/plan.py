"""Chooses where each rule runs (local, reduce or owner), from shapes and groups alone.

Costs are those of the busiest rank, since all others wait for it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from symdist.exchange.collectives.balance import balance
from symdist.exchange.collectives.residual_sums import StagePlan, StageSlot
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.stack import Stack, Strategy, travels_as
from symdist.exchange.hardware import Hardware
from symdist.exchange.options import ExchangeOptions
from symdist.exchange.planning.costs import Axis, shard_cost, unit_cost, unit_flops, units_of
from symdist.exchange.planning.flat_plan import plan_flat
from symdist.layouts import FlatLayout, Group, Layout
from symdist.layouts.flat import flat_among


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a step.

    Attributes:
        local: The jobs that need no other rank.
        waves: The other jobs, by wave.
        work: By group, the FLOPs of each rank in a step. Roots and QRs of sums are not included: the least loaded ranks
            take them during the step.
    """

    local: list[Job]
    waves: list[list[Job]]
    work: dict[Group, list[float]] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        """All jobs: first the local ones, then those of each wave."""
        return self.local + [job for wave in self.waves for job in wave]

    @property
    def largest_unit(self) -> float:
        """The FLOPs of the costliest unit that one rank must update by itself; 0 if there is none."""
        return max((unit_flops(job.stack) for job in self.jobs if job.strategy != "reduce"), default=0.0)

    def groups(self) -> set[Group]:
        """Return all groups that communicate in a step."""
        return {group for job in self.jobs for group in job.groups}

    def strategies(self) -> dict[int, Strategy]:
        """Return the strategy of every parameter, by its index in the optimizer's list."""
        return {member: job.strategy for job in self.jobs for member in job.everyone}


def make_plan(
    stacks: Mapping[Stack, Sequence[int]],
    *,
    names: Sequence[str],
    layouts: Sequence[Layout | FlatLayout],
    exchange: ExchangeOptions,
    stages: Mapping[int, StageSlot] | None = None,
) -> Plan:
    """Choose where every stack runs, split the jobs into waves, and choose owners for the units that need one.

    The waves fit within `exchange.bucket_bytes`, except that a parameter or residual stage larger than the budget makes
    a wave of its own. Nothing is sent: every rank computes its plan by itself, and all ranks that hold a parameter
    compute the same plan for it.

    Args:
        stacks: By stack, the indices of its parameters, in an order that is the same on all ranks that hold them.
        names: The names of all parameters, by index.
        layouts: How all parameters are stored, by index.
        exchange: Gives the budget, the speeds by which strategies are chosen, and the dtype in which matrices are sent
            (see `travels_as`).
        stages: The residual stage of every parameter whose rule couples the matrices of a stage; all matrices of a
            stage are in one wave. None by default.

    Returns:
        The plan of this rank.

    Raises:
        ValueError: If a parameter's layout does not admit its group's `strategy`; the message names the parameter.

    Example:
        >>> plan = make_plan(
        ...     {stack: [0, 1]}, names=["w0", "w1"], layouts=[stack.layout] * 2, exchange=ExchangeOptions()
        ... )
        >>> plan.strategies()
    """
    jobs: list[Job] = []
    # Half of the bound for each wave, since waves overlap: besides the wave being computed, the next one is being sent
    # out while the previous one is being sent back.
    budget = exchange.bucket_bytes // 2
    sizes = {i: _coupled_bytes(stack) for stack, members in stacks.items() if stack.coupled for i in members}
    stage_plan = StagePlan.cut(stages or {}, sizes, budget=budget)
    flat: dict[Stack, list[tuple[int, FlatLayout]]] = {}
    for stack, all_members in stacks.items():
        members, flat[stack] = flat_among(all_members, layouts)
        if not members:
            continue
        dtype = travels_as(stack, exchange.communication_dtype)
        strategy = _choose(stack, len(members), dtype, exchange.hardware, name=names[members[0]])
        if stack.coupled:
            parts = stage_plan.parts(members, lambda member: member)
        else:
            step = max(1, int(budget // max(1.0, _flight_bytes(stack, strategy))))
            parts = [members[start : start + step] for start in range(0, len(members), step)]
        jobs += [
            Job(
                stack=stack,
                members=tuple(part),
                everyone=tuple(part),
                layouts=(stack.layout,) * len(part),
                strategy=strategy,
                alone=strategy == "owner",
                flight_bytes=len(part) * _flight_bytes(stack, strategy),
                communication_dtype=dtype,
                stages=stage_plan.of(part) if stack.coupled else (),
            )
            for part in parts
        ]
    work = _work_in_place(jobs)
    all_jobs: list[Job] = [
        *_with_owners(jobs, work),
        *plan_flat(
            flat,
            names=names,
            budget=budget,
            communication_dtype=exchange.communication_dtype,
            hardware=exchange.hardware,
            work=work,
            stages=stage_plan,
        ),
    ]
    local = [job for job in all_jobs if job.strategy == "local" and not job.stages]
    others = [job for job in all_jobs if job.strategy != "local" or job.stages]
    return Plan(local=local, waves=_waves(others, budget, stage_plan), work=work)


def _cut(stack: Stack) -> dict[Axis, Group]:
    """Return the axes along which the matrices themselves are cut, and the ranks along each."""
    return {axis: group for axis, group in stack.splits.items() if axis in ("rows", "columns")}


def possible_strategies(stack: Stack) -> list[Strategy]:
    """Return the strategies that a stack's rule, view and layout admit.

    Args:
        stack: A stack of parameters that are not cut into ranges of elements.

    Returns:
        The strategies; at least one.
    """
    strategies: list[Strategy] = []
    cut = _cut(stack)
    if not cut and "unaligned" not in stack.splits:
        strategies.append("local")
    elif "unaligned" not in stack.splits and set(cut) <= set(stack.admitted):
        strategies.append("reduce")
    return [*strategies, "owner"] if stack.layout.group is not None else strategies


def _choose(stack: Stack, count: int, communication_dtype: torch.dtype, hardware: Hardware, *, name: str) -> Strategy:
    """Return the strategy that the user chose, or the cheapest possible one if that is "auto"."""
    possible = possible_strategies(stack)
    if stack.requested_strategy != "auto":
        if stack.requested_strategy not in possible:
            raise ValueError(
                f"{name}: rule {stack.rule.name!r} cannot run with strategy {stack.requested_strategy!r} on this "
                f"layout; set strategy to {', '.join(map(repr, possible))} or 'auto'"
            )
        return stack.requested_strategy
    costs: dict[Strategy, Callable[[], float]] = {
        "local": lambda: count * _operations(stack) / hardware.flops_per_byte,
        "reduce": lambda: _reduce_cost(stack, count, _cut(stack), hardware),
        "owner": lambda: _owner_cost(stack, count, communication_dtype, hardware),
    }
    return min(possible, key=lambda strategy: costs[strategy]()) if len(possible) > 1 else possible[0]


def _operations(stack: Stack) -> float:
    """Return the FLOPs on the largest piece, which consists of whole matrices."""
    if 0 in stack.layout.largest_shape:
        return 0.0
    cost = shard_cost(stack, stack.layout.largest_shape)
    return cost.flops + cost.root_flops


def _owner_cost(stack: Stack, count: int, communication_dtype: torch.dtype, hardware: Hardware) -> float:
    """Return the cost of the busiest rank in bytes.

    It adds up the pieces sent to owners, the updates sent to every copy of the weight, and the FLOPs converted to
    bytes.
    """
    layout = stack.layout
    assert layout.group is not None
    ranks, copies = layout.group.size, layout.num_replicas
    units = count * units_of(stack)
    owned_units = -(-units // ranks)
    unit = math.prod(layout.shape) / units_of(stack)
    shards = ranks // copies
    fields = 1 + len(stack.state_names)
    numbers_out = fields * count * math.prod(layout.largest_shape) * (shards - 1) / shards / copies
    numbers_back = fields * owned_units * unit * (copies - 1 / shards)
    cost = unit_cost(stack)
    return (numbers_out + numbers_back) * communication_dtype.itemsize + owned_units * (
        cost.flops + cost.root_flops
    ) / hardware.flops_per_byte


def _reduce_cost(stack: Stack, count: int, cut: Mapping[Axis, Group], hardware: Hardware) -> float:
    """Return the cost of the busiest rank in bytes: the sums over the ranks, and the FLOPs converted to bytes."""
    cost = shard_cost(stack, stack.layout.largest_shape, tuple(cut))
    sent = sum(
        2 * count * cost.summed[axis] * (group.size - 1) / group.size * stack.dtype.itemsize
        for axis, group in cut.items()
    )
    ranks = max(group.size for group in cut.values())
    matrices = count * stack.view.count
    roots = cost.root_flops * count * -(-matrices // ranks) / matrices
    return sent + (count * cost.flops + roots) / hardware.flops_per_byte


def _waves(jobs: list[Job], budget: int, stages: StagePlan) -> list[list[Job]]:
    """Fill waves with jobs of the same ranks, within the budget, in an order that all ranks agree on."""
    by_ranks: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        group = job.stack.layout.group
        by_ranks.setdefault(() if group is None else group.ranks, []).append(job)
    waves: list[list[Job]] = []
    for ranks in sorted(by_ranks):
        room = 0.0
        wave: list[Job] = []
        coupled: dict[int, list[Job]] = {}
        for job in by_ranks[ranks]:
            if job.stages:
                coupled.setdefault(stages.wave(job.stages), []).append(job)
                continue
            if not wave or job.flight_bytes > room:
                wave = []
                waves.append(wave)
                room = budget
            wave.append(job)
            room -= job.flight_bytes
        waves += [coupled[i] for i in sorted(coupled)]
    return waves


def _coupled_bytes(stack: Stack) -> float:
    """Return about how many bytes a parameter of a residual stage holds on a rank while it is under way.

    They are its share of the weight, and of what its stage sends out and gets back.
    """
    ranks = 1 if stack.layout.group is None else stack.layout.group.size
    share = 8.0 * (1 + len(stack.state_names)) * math.prod(stack.layout.shape) / ranks
    return (share + 4.0 * stack.rows * min(stack.rows, stack.columns)) * stack.dtype.itemsize


def _flight_bytes(stack: Stack, strategy: Strategy) -> float:
    """Return a bound on the bytes that one parameter holds on a rank while under way, without what a single unit needs.

    In place (local and reduce), these are the direction, its copy in the stack, the update and intermediates, and for
    each Gram the triangle sent and received, the matrix and its root. At owners, these are the pieces sent and
    received, and for the owned share the parts received, put together, updated and sent, and intermediates. The bound
    uses the largest piece of any rank, since all ranks must split the jobs into the same waves.
    """
    piece = math.prod(stack.layout.largest_shape)
    states = len(stack.state_names)
    if strategy != "owner":
        summed = (
            shard_cost(stack, stack.layout.largest_shape, tuple(_cut(stack))).summed if strategy == "reduce" else {}
        )
        return ((4.0 + 3.0 * states) * piece + 6.0 * sum(summed.values())) * stack.dtype.itemsize
    assert stack.layout.group is not None
    share = math.prod(stack.layout.shape) / stack.layout.group.size
    fields = 1 + states
    return fields * (2.0 * piece + (6.0 + stack.layout.num_replicas) * share) * stack.dtype.itemsize


def _work_in_place(jobs: list[Job]) -> dict[Group, list[float]]:
    """Return, by group, the FLOPs of every rank on jobs that run where the pieces are (local and reduce)."""
    work: dict[Group, list[float]] = {}
    for job in jobs:
        group = job.stack.layout.group
        if group is None:
            continue
        loads = work.setdefault(group, [0.0] * group.size)
        if job.strategy != "owner":
            for rank, box in enumerate(job.stack.layout.boxes):
                shape = tuple(map(len, box))
                if 0 not in shape:
                    cost = shard_cost(job.stack, shape)
                    roots = cost.root_flops if job.strategy == "local" else 0.0
                    loads[rank] += len(job.members) * (cost.flops + roots)
    return work


def _with_owners(jobs: list[Job], work: dict[Group, list[float]]) -> list[Job]:
    """Choose the owners of every owner job, balanced by FLOPs over all jobs of a group; adds to `work`.

    Units of the same cost are assigned to the ranks in turn, so each wave is balanced about as well as the whole step.
    """
    by_group: dict[Group, list[Job]] = {}
    for job in jobs:
        if job.strategy == "owner":
            assert job.stack.layout.group is not None
            by_group.setdefault(job.stack.layout.group, []).append(job)
    owners: dict[int, tuple[int, ...]] = {}
    for group, owned in by_group.items():
        counts = [len(job.members) * units_of(job.stack) for job in owned]
        costs = [cost for job, count in zip(owned, counts, strict=True) for cost in [unit_flops(job.stack)] * count]
        parts = iter(balance(costs, parts=group.size, loads=work[group]))
        for job, count in zip(owned, counts, strict=True):
            owners[id(job)] = tuple(itertools.islice(parts, count))
    return [dataclasses.replace(job, owners=owners.get(id(job), ())) for job in jobs]
