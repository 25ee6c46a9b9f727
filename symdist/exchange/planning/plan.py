"""Chooses where each rule runs (local, reduce or owner), from shapes and groups alone.

Costs are those of the busiest rank, since all others wait for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from symdist.exchange.collectives.residual_sums import StagePlan, StageSlot
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.stack import Stack, Strategy
from symdist.exchange.options import ExchangeOptions
from symdist.exchange.planning.buffers import coupled_bytes, peak_of
from symdist.exchange.planning.costs import precision_of, unit_flops
from symdist.exchange.planning.kinds import choose_strategy, kinds_of
from symdist.exchange.planning.owners import choose_owners, form_teams, lighten, work_in_place
from symdist.exchange.planning.waves import jobs_of, waves_of
from symdist.hardware import Hardware
from symdist.layouts import FlatLayout, Group, Layout

_LARGEST = 100.0
"""A step holds far less than this many times the weights, so that smaller models need no buffers worked out."""


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

    def largest_unit(self, hardware: Hardware) -> float:
        """Return the FLOPs of the costliest unit that one rank must update by itself; 0 if there is none.

        Args:
            hardware: The speeds of the ranks.
        """
        stacks = {job.stack for job in self.jobs if job.strategy != "reduce"}
        return max((unit_flops(stack, hardware=hardware) for stack in stacks), default=0.0)

    @property
    def peak_bytes(self) -> float:
        """About how many bytes the busiest rank holds at most at a time; see `planning.buffers`."""
        return peak_of([[job.held for job in wave] for wave in self.waves], [job.held for job in self.local])

    def groups(self) -> set[Group]:
        """Return all groups that communicate in a step."""
        return {group for job in self.jobs for group in job.groups}

    def strategies(self) -> dict[int, Strategy]:
        """Return the strategy of every parameter, by its index in the optimizer's list."""
        return {member: job.strategy for job in self.jobs for member in job.everyone}

    def precisions(self) -> dict[int, str]:
        """Return the precision of every parameter's roots, by its index; empty text if its rule computes none."""
        return {i: precision_of(job.stack, job.parts) for job in self.jobs for i in job.everyone}


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
    # Half of the bound for each wave, since waves overlap: besides the wave being computed, the next one is being sent
    # out while the previous one is being sent back.
    budget: float = exchange.bucket_bytes // 2
    if _LARGEST * sum(stack.numel * stack.dtype.itemsize * len(members) for stack, members in stacks.items()) <= budget:
        budget = math.inf
    sizes = {i: coupled_bytes(stack) for stack, members in stacks.items() if stack.coupled for i in members}
    stage_plan = StagePlan.cut(stages or {}, sizes, budget=budget)
    kinds = kinds_of(stacks, names=names, layouts=layouts, exchange=exchange)
    for kind in kinds:
        kind.strategy = choose_strategy(kind)
    work = work_in_place(kinds)
    lighten(kinds, work)
    form_teams(kinds, work)
    choose_owners(kinds, work)
    jobs = [job for kind in kinds for job in jobs_of(kind, budget=budget, stages=stage_plan)]
    local = [job for job in jobs if job.strategy == "local" and not job.stages]
    others = [job for job in jobs if job.strategy != "local" or job.stages]
    return Plan(local=local, waves=waves_of(others, budget=budget, stages=stage_plan), work=work)
