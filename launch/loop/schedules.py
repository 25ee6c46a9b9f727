"""Learning-rate schedules, chosen per parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from symdist.routing.recipes import schedule_key

Shape = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Multiplier of a base learning rate over the steps of a run.

    Every shape rises linearly over the first ``warmup`` steps, and reaches 1 on the last of them. After that
    ``linear`` holds 1 until the share ``constant`` of all steps is done and then falls linearly, ``cosine``
    falls along half a cosine at once, and ``constant`` holds 1 to the end. Both falls end at ``final``.

    Args:
        shape: ``"linear"``, ``"cosine"`` or ``"constant"``.
        warmup: length of the rise, in optimizer steps.
        constant: share of all steps, in [0, 1], that are done when the linear fall begins; a longer warmup
            pushes that point back. Only ``linear`` reads it.
        final: multiplier that the fall would reach at step ``total``, one past the last step.

    Raises:
        ValueError: for an unknown shape, a negative warmup, or a share outside [0, 1].
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
            raise ValueError(f"constant is {self.constant}; it is a share of the steps, between 0 and 1")

    def factor(self, step: int, total: int) -> float:
        """Return the multiplier for the step numbered ``step`` from 0, of ``total`` steps.

        Raises:
            ValueError: where ``total`` is not positive or the warmup is longer than the run.
        """
        if total < 1:
            raise ValueError(f"a schedule needs at least one step, not {total}")
        if self.warmup > total:
            raise ValueError(f"warmup takes {self.warmup} steps but the run has only {total}; shorten the warmup")
        if step < self.warmup:
            # Counted from one: a first step at a rate of zero would be a wasted batch.
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
    """Return a scheduler that runs each parameter group along its own schedule.

    A group takes the schedule filed under its ``group["schedule"]``, else the one under its ``group["role"]`` or the
    nearest role that this falls back to in recipes, else the one under its ``group["rule"]``, else the one under
    ``"default"``. The scheduler's ``state_dict()`` survives a round trip through JSON.

    Args:
        optimizer: its groups' present learning rates become the base rates.
        schedules: schedules by role, by rule, or ``"default"``.
        total: length of the run, in optimizer steps.

    Raises:
        ValueError: where a group finds no schedule, or a schedule does not fit ``total``.
    """
    factors: list[Callable[[int], float]] = [
        partial(_schedule_of(group, index, schedules=schedules).factor, total=total)
        for index, group in enumerate(optimizer.param_groups)
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _schedule_of(group: dict[str, Any], index: int, *, schedules: Mapping[str, Schedule]) -> Schedule:
    # Groups that hold many roles have none themselves, and say which schedule they follow.
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
