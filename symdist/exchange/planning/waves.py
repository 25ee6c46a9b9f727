"""Divides the parameters of a kind into jobs, and jobs into waves, so that what is under way fits a budget."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable

from symdist.exchange.collectives.residual_sums import StagePlan
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.stack import Stack, Strategy
from symdist.exchange.planning.buffers import PHASES, Held, held_for, share_of_budget, total
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
    together = kind.cut if kind.strategy == "owner" else []
    if kind.team is not None:
        jobs += _jobs(kind, together, "owner", kind.in_team, budget=budget, stages=stages, alone=False)
        together = []
    jobs += _jobs(kind, [*kind.sent, *together], "owner", kind.stack, budget=budget, stages=stages)
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
        for everyone, held in _parts(kind, together, strategy, stack, budget=math.inf if coupled else budget):
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
                    team=strategy == "owner" and not alone,
                    owners=tuple(itertools.chain.from_iterable(owners[i] for i, _ in here)),
                    multiple=multiple,
                    travels=strategy == "owner" or any(layout.cuts_rows(multiple) for _, layout in everyone),
                    column_blocks=kind.column_blocks,
                    weigh=held,
                    communication_dtype=kind.dtype,
                    stages=stages.of(indices) if coupled else (),
                )
            )
    return jobs


def _parts(
    kind: Kind, members: Members, strategy: Strategy, stack: Stack, *, budget: float
) -> list[tuple[Members, Callable[[], Held]]]:
    """Split parameters, in order, into parts that fit the busiest rank's budget.

    Each part comes with what the busiest rank holds for it, worked out when it is asked for. All ranks must split the
    parameters into the same parts.
    """

    def held_of(part: Members) -> dict[int, Held]:
        loads: dict[int, Held] = {}
        for i, layout in part:
            for rank, held in held_for(kind, layout, strategy, stack, kind.owners.get(i, ())).items():
                loads[rank] = total([loads[rank], held]) if rank in loads else held
        return loads

    def busiest(part: Members) -> Held:
        loads = held_of(part).values()
        return {phase: max(held[phase] for held in loads) for phase in PHASES}

    if budget == math.inf:
        return [(members, functools.partial(busiest, members))]
    parts: list[Members] = []
    loads: dict[int, Held] = {}
    for member in members:
        needed = held_of([member])
        added = {rank: total([loads[rank], held]) if rank in loads else held for rank, held in needed.items()}
        if not parts or any(share_of_budget(held) > budget for held in added.values()):
            parts.append([])
            loads, added = {}, needed
        parts[-1].append(member)
        loads |= added
    return [(part, functools.partial(busiest, part)) for part in parts]


def waves_of(jobs: Iterable[Job], *, budget: float, stages: StagePlan) -> list[list[Job]]:
    """Fill waves with jobs of the same ranks, within the budget, in an order that all ranks agree on.

    Args:
        jobs: The jobs that communicate.
        budget: How many bytes a wave may hold on a rank; infinite for one wave for each group of ranks.
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
        coupled: dict[int, list[Job]] = {}
        for job in by_ranks[ranks]:
            if job.stages:
                coupled.setdefault(stages.wave(job.stages), []).append(job)
                continue
            needed = 0.0 if budget == math.inf else share_of_budget(job.held)
            if needed > room or not room:
                waves.append([])
                room = budget
            waves[-1].append(job)
            room -= needed
        waves += [coupled[i] for i in sorted(coupled)]
    return waves
