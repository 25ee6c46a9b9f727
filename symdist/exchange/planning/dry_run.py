"""A dry run of a step: runs a plan on meta tensors, without data, so that a transport can count its collectives."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from symdist.exchange.collectives.transport import CountingTransport
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.scheduler import Task, run
from symdist.exchange.execution.stack import StepInputs
from symdist.exchange.planning.plan import Plan
from symdist.layouts import Group


def dry_run(
    plan: Plan, counting: CountingTransport, *, change: Callable[[Job], Job | None] = lambda job: job
) -> dict[Group, list[float]]:
    """Run the jobs of a plan on meta tensors.

    Pass a `CountingTransport` that wraps no other transport: then nothing is sent, and a single rank can call this by
    itself. No weight is written.

    Args:
        plan: The plan to run.
        counting: Records the collectives.
        change: Called with every job; returns the job to run in its place, or None to leave it out. By default, all
            jobs run as they are.

    Returns:
        By group, the FLOPs of each rank in a step; see `run`.

    Example:
        >>> counting = CountingTransport()
        >>> dry_run(plan, counting)
    """

    def task(job: Job) -> Task | None:
        changed = change(job)
        if changed is None:
            return None
        meta = dataclasses.replace(changed, stack=dataclasses.replace(changed.stack, device=torch.device("meta")))
        return meta.task(partial(_pieces, meta), lambda outputs: None)

    waves = [[changed_task for job in wave if (changed_task := task(job))] for wave in plan.waves]

    def meanwhile() -> None:
        for job in plan.local:
            if changed_task := task(job):
                changed_task.advance()

    return run([wave for wave in waves if wave], transport=counting, meanwhile=meanwhile, work=plan.work)


def _pieces(job: Job) -> StepInputs:
    """Return meta tensors in the shapes of this rank's pieces of a job."""
    pieces = [torch.empty(layout.local_shape, dtype=job.stack.dtype, device="meta") for layout in job.layouts]
    gradients = pieces if job.stack.skip_zero_grad_rows else None
    return StepInputs(directions=pieces, gradients=gradients, states=tuple(pieces for _ in job.stack.state_names))
