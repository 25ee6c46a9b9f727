"""Divides the parameters of a kind into jobs, and jobs into waves, so that what is under way fits a budget."""

import itertools
from collections.abc import Iterable

from symdist.exchange.collectives.residual_sums import StagePlan
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.stack import Stack, Strategy
from symdist.exchange.planning.costs import shard_cost
from symdist.exchange.planning.kinds import Kind, Members
from symdist.layouts import FlatLayout, Layout


def jobs_of(kind: Kind, *, budget: float, stages: StagePlan) -> list[Job]:
    """Return the jobs of a kind, each within the budget unless a single parameter is larger.

    Args:
        kind: The parameters, with their strategies and owners.
        budget: How many bytes a job may hold on a rank.
        stages: The residual stages and their waves, by which parameters that belong to one are divided instead.

    Returns:
        This rank's jobs. Those of matrices that are whole on this rank are known to this rank alone.
    """
    whole = [(i, layout) for i, layout in kind.whole if layout.takes_part()]
    jobs = _jobs(kind, whole, "local", kind.stack, budget=budget, stages=stages)
    owned = [*kind.sent, *(kind.cut if kind.strategy == "owner" else [])]
    jobs += _jobs(kind, owned, "owner", kind.stack, budget=budget, stages=stages)
    if kind.strategy != "owner":
        alone = [(i, layout) for i, layout in kind.cut if kind.alone(layout)]
        jobs += _jobs(kind, alone, kind.strategy, kind.stack, budget=budget, stages=stages)
        by_layout: dict[Layout | FlatLayout, Members] = {}
        for i, layout in kind.cut:
            if not kind.alone(layout):
                by_layout.setdefault(layout, []).append((i, layout))
        for layout, members in by_layout.items():
            rows = kind.in_place(layout)
            jobs += _jobs(kind, members, kind.strategy, rows, budget=budget, stages=stages, alone=False)
    return jobs


def _jobs(
    kind: Kind,
    members: Members,
    strategy: Strategy,
    stack: Stack,
    *,
    budget: float,
    stages: StagePlan,
    alone: bool = True,
) -> list[Job]:
    """Return the jobs of parameters that run alike."""
    if not members:
        return []
    coupled = kind.stack.coupled
    multiple = kind.multiple if strategy == "reduce" else 1
    jobs = []
    for together in stages.parts(members, lambda item: item[0]) if coupled else [members]:
        for everyone, flight in _parts(kind, together, strategy, stack, budget=float("inf") if coupled else budget):
            owners = {i: kind.owners[i] if strategy == "owner" else () for i, _ in everyone}
            here = [(i, layout) for i, layout in everyone if not alone or layout.takes_part(owners[i])]
            indices = tuple(i for i, _ in everyone)
            jobs.append(
                Job(
                    stack=stack,
                    members=tuple(i for i, _ in here),
                    everyone=indices,
                    layouts=tuple(layout for _, layout in here),
                    strategy=strategy,
                    alone=alone,
                    owners=tuple(itertools.chain.from_iterable(owners[i] for i, _ in here)),
                    multiple=multiple,
                    travels=strategy == "owner" or any(layout.cuts_rows(multiple) for _, layout in everyone),
                    column_blocks=kind.column_blocks,
                    flight_bytes=flight,
                    communication_dtype=kind.dtype,
                    stages=stages.of(indices) if coupled else (),
                )
            )
    return jobs


def _parts(
    kind: Kind, members: Members, strategy: Strategy, stack: Stack, *, budget: float
) -> list[tuple[Members, float]]:
    """Split parameters, in order, into parts that fit the busiest rank's budget.

    Each part comes with the bytes that the busiest rank holds for it. All ranks must split the parameters into the same
    parts.
    """
    parts: list[Members] = []
    flights: list[float] = []
    loads: dict[int, float] = {}
    for i, layout in members:
        needed = _needed(kind, layout, strategy, stack, kind.owners.get(i, ()))
        if not parts or any(loads.get(rank, 0.0) + size > budget for rank, size in needed.items()):
            parts.append([])
            flights.append(0.0)
            loads = {}
        parts[-1].append((i, layout))
        for rank, size in needed.items():
            loads[rank] = loads.get(rank, 0.0) + size
            flights[-1] = max(flights[-1], loads[rank])
    return list(zip(parts, flights, strict=True))


def _needed(kind, layout, strategy, stack, owners):
    s = kind.fields - 1
    summed = 0.0
    if strategy == "reduce":
        rows = kind.in_place(layout)
        summed = sum(shard_cost(rows, rows.layout.largest_shape, tuple(rows.cut)).summed.values())
    if layout.completed:
        if strategy != "owner":
            needed = {0: (4.0 + 3 * s) * layout.loads[0] + 6 * summed}
        else:
            needed = {0: kind.fields * (2 * layout.loads[0] + (6 + layout.num_replicas) * layout.loads_of(owners)[0])}
    elif strategy == "local":
        needed = {0: 4.0 * kind.fields * stack.numel}
    else:
        needed = {rank: 6.0 * kind.fields * n for rank, n in layout.loads.items()}
        if strategy == "owner":
            for rank, n in layout.loads_of(owners).items():
                needed[rank] = needed.get(rank, 0) + 7 * kind.fields * n
        elif summed:
            for rank in range(kind.group.size):
                needed[rank] = needed.get(rank, 0) + 6 * summed
    return {rank: n * stack.dtype.itemsize for rank, n in needed.items()}


def waves_of(jobs: Iterable[Job], *, budget: float, stages: StagePlan) -> list[list[Job]]:
    """Fill waves with jobs of the same ranks, within the budget, in an order that all ranks agree on.

    Args:
        jobs: The jobs that communicate.
        budget: How many bytes a wave may hold on a rank.
        stages: The residual stages; all jobs of a stage are in one wave.

    Returns:
        The waves; those of one group of ranks are adjacent.
    """
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
