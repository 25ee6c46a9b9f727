"""One optimizer step: gives jobs their inputs, and writes their results to weights and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symdist.decay import decay_and_subtract, decaying
from symdist.exchange import FlatJob, Job, StepInputs, StepOutputs, Task
from symdist.gradients.momentum import adamw_step, advance
from symdist.layouts import local
from symdist.param_groups import ParamSpec

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor


class Step:
    """Reads and writes an optimizer's weights and state for the jobs of one step.

    Args:
        specs: All parameters of the optimizer.
        groups: The optimizer's param groups.
        state: The state of every parameter, by parameter.
        gradients: This rank's piece of every gradient, in the order of `specs`.
        observer: Measures this step; None for a step without diagnostics.
    """

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        gradients: Sequence[Tensor],
        observer: StepMonitor | None,
    ):
        self._specs = specs
        self._groups = groups
        self._state = state
        self._gradients = gradients
        self._observer = observer

    def task(self, job: Job | FlatJob) -> Task:
        """Make the task that runs a job of this step."""
        observe_root = None
        if self._observer is not None:
            observe_root = partial(self._observer.rooted, [self._role(self._specs[i].group) for i in job.members])
        task = job.task(partial(self._read, job), partial(self._write, job), observe_root=observe_root)
        task.names = [self._specs[i].name for i in job.members]
        return task

    def adamw(self) -> None:
        """Step the parameters without a stack by PyTorch's AdamW, on the local pieces; nothing is sent."""
        plain = [i for i, spec in enumerate(self._specs) if spec.stack is None and spec.parameter.requires_grad]
        for group, indices in self._by_group(plain):
            weights = [local(self._specs[i].parameter) for i in indices]
            wide = [weight.to(self._specs[i].dtype) for i, weight in zip(indices, weights, strict=True)]
            lr, decay, cautious = float(group["lr"]), group["weight_decay"], group["cautious_weight_decay"]
            before = [weight.clone() for weight in wide] if self._observer is not None or cautious else []
            adamw_step(
                wide,
                [self._local_state(i) for i in indices],
                [self._gradients[i].to(self._specs[i].dtype) for i in indices],
                betas=group["betas"],
                eps=group["eps"],
                lr=lr,
                weight_decay=0.0 if cautious else decay,
            )
            # The part of each weight's change that is decay, so that observers see the step without it.
            lost = [lr * decay * old for old in before]
            if cautious:
                lost = [of * decaying(old, old - new) for of, old, new in zip(lost, before, wide, strict=True)]
                torch._foreach_sub_(wide, lost)
            for weight, stepped in zip(weights, wide, strict=True):
                if weight is not stepped:
                    weight.copy_(stepped)
            if self._observer is not None:
                parts = zip(wide, before, lost, strict=True)
                self._observe(indices, [stepped - old + of for stepped, old, of in parts])

    def _read(self, job: Job | FlatJob) -> StepInputs:
        directions: dict[int, Tensor] = {}
        for group, indices in self._by_group(job.members):
            states = [self._local_state(i) for i in indices]
            given = [self._gradients[i].to(job.stack.dtype) for i in indices]
            directions.update(zip(indices, advance(job.stack.rule.accumulator, states, given, group), strict=True))
        remembered = [self._local_state(i) for i in job.members] if job.stack.state_names else []
        return StepInputs(
            directions=[directions[i] for i in job.members],
            gradients=[self._gradients[i] for i in job.members] if job.stack.skip_zero_grad_rows else None,
            states=tuple([state[name] for state in remembered] for name in job.stack.state_names),
        )

    def _write(self, job: Job | FlatJob, made: StepOutputs) -> None:
        """Subtract the updates and the decay from the weights, and store what the rule remembers."""
        place_of = {index: place for place, index in enumerate(job.members)}
        for group, indices in self._by_group(job.members):
            places = [place_of[i] for i in indices]
            for name, field in zip(job.stack.state_names, made.states, strict=True):
                torch._foreach_copy_([self._local_state(i)[name] for i in indices], [field[place] for place in places])
            chosen = [made.updates[place] for place in places]
            decay_and_subtract(
                [local(self._specs[i].parameter) for i in indices],
                chosen,
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                cautious=group["cautious_weight_decay"],
                moving=None if made.moved is None else [made.moved[place] for place in places],
            )
            if self._observer is not None:
                self._observe(indices, torch._foreach_mul(chosen, float(group["lr"])))

    def _observe(self, indices: list[int], steps: Iterable[Tensor]) -> None:
        assert self._observer is not None
        found = [self._specs[i] for i in indices]
        self._observer.moved(
            self._role(found[0].group),
            [spec.layout for spec in found],
            [local(spec.parameter) for spec in found],
            list(steps),
            padding_rows=self._groups[found[0].group]["padding_rows"],
        )

    def _role(self, group: int) -> str:
        return self._groups[group]["role"] or self._groups[group]["rule"]

    def _by_group(self, indices: Iterable[int]) -> list[tuple[Mapping[str, Any], list[int]]]:
        by_group: dict[int, list[int]] = {}
        for i in indices:
            by_group.setdefault(self._specs[i].group, []).append(i)
        return [(self._groups[group], found) for group, found in by_group.items()]

    def _local_state(self, index: int) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self._state[self._specs[index].parameter].items()}
