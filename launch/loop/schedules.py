"""Learning-rate schedules, one per parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from symdist.routing.recipes import schedule_key

Shape = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Multiplier of a base learning rate over the steps of a run.

    Every shape rises linearly over the first ``warmup`` steps and reaches 1 on the last of them. Then ``linear`` stays
    at 1 until the fraction ``constant`` of all steps is done and decays linearly, ``cosine`` decays along half a cosine
    at once, and ``constant`` stays at 1 to the end. Both decays end at ``final``.

    Args:
        shape: ``"linear"``, ``"cosine"`` or ``"constant"``.
        warmup: Length of the warmup, in optimizer steps.
        constant: Fraction of all steps, in [0, 1], after which the linear decay begins; never before the end of the
            warmup. Only ``linear`` reads it.
        final: Multiplier that the decay would reach at step ``total``, one past the last step.

    Raises:
        ValueError: If the shape is unknown, the warmup is negative, or ``constant`` is outside [0, 1].

    Example:
        >>> Schedule(shape="linear", warmup=100, constant=0.6).factor(50, total=1000)
        0.51
    """

    shape: Shape
    warmup: int = 0
    constant: float = 0.6
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            known = ", ".join(get_args(Shape))
            raise ValueError(f"unknown schedule shape {self.shape!r}; choose from {known}")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup} steps; it cannot be negative")
        if not 0 <= self.constant <= 1:
            raise ValueError(f"constant is {self.constant}; it must be a fraction of the steps, between 0 and 1")

    def factor(self, step: int, total: int) -> float:
        """Return the learning-rate multiplier of one step.

        Args:
            step: The step's number, from 0.
            total: Number of steps of the run.

        Raises:
            ValueError: If ``total`` is not positive or the warmup is longer than the run.
        """
        if total < 1:
            raise ValueError(f"a schedule needs at least one step, not {total}")
        if self.warmup > total:
            raise ValueError(f"warmup is {self.warmup} steps but the run has only {total}; shorten the warmup")
        if step < self.warmup:
            # Counted from one, since a first step with a rate of zero would waste a batch.
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        start = self.warmup if self.shape == "cosine" else max(float(self.warmup), self.constant * total)
        if step <= start and step < total:
            return 1.0
        if step >= total:
            return self.final
        done = (step - start) / (total - start)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedules: Mapping[str, Schedule], total: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a scheduler that gives each parameter group its own schedule.

    A group takes the first of these keys that ``schedules`` has: its ``group["schedule"]``; its ``group["role"]`` or
    the nearest role that it falls back to in recipes; its ``group["rule"]``; ``"default"``. The scheduler's
    ``state_dict()`` can be stored as JSON.

    Args:
        optimizer: The optimizer, whose current learning rates become the base rates.
        schedules: Schedules by role, by rule, or ``"default"``.
        total: Length of the run, in optimizer steps.

    Raises:
        ValueError: If a group has no schedule, or a schedule does not fit ``total``.

    Example:
        >>> schedules = {"default": Schedule(shape="linear"), "head": Schedule(shape="cosine", warmup=100)}
        >>> scheduler = build_scheduler(optimizer, schedules, total=1000)
    """
    factors: list[Callable[[int], float]] = [
        partial(_schedule_of(group, index, schedules=schedules).factor, total=total)
        for index, group in enumerate(optimizer.param_groups)
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def move_to(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int, *, base_lrs: Sequence[float]) -> None:
    """Continue a scheduler of `build_scheduler` after a step, with the rates and schedules of this run.

    Args:
        scheduler: The scheduler; what a checkpoint says of it is of no account.
        step: Steps done.
        base_lrs: The base learning rates of the groups.
    """
    scheduler.base_lrs = list(base_lrs)
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    factors = zip(scheduler.optimizer.param_groups, base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in factors:
        group["initial_lr"], group["lr"] = base, base * factor(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _schedule_of(group: dict[str, Any], index: int, *, schedules: Mapping[str, Schedule]) -> Schedule:
    # Groups that hold several roles have no role of their own, and name their schedule instead.
    name = group.get("schedule")
    if name not in schedules:
        name = schedule_key(schedules, group.get("role", ""), group.get("rule", ""))
    if name is not None:
        return schedules[name]
    raise ValueError(
        f"parameter group {index} ({_described(group)}) has no schedule among {sorted(schedules)}; "
        "add one under its role or its rule, or a 'default'"
    )


def _described(group: dict[str, Any]) -> str:
    if "rules" in group:
        return "rules by role: " + ", ".join(f"{role} {rule}" for role, rule in group["rules"].items())
    return f"role {group.get('role')!r}, rule {group.get('rule')!r}"
