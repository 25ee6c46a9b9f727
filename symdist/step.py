"""One optimizer step: gives jobs their inputs, and writes their results to weights and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symdist.decay import decay_and_subtract, decaying
from symdist.exchange import Job, Plan, StepInputs, StepOutputs, StepProgress, Task, Transport, run
from symdist.gradients.momentum import adamw_step, advance
from symdist.layouts import local
from symdist.param_specs import ParamSpec

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

    def run(self, plan: Plan, *, transport: Transport, progress: StepProgress) -> None:
        """Update every parameter; all ranks of the plan call it.

        Args:
            plan: Which jobs run where, and in which waves.
            transport: The transport that runs the collectives.
            progress: Records what the step waits for, for reports on a hung step.

        Raises:
            ExchangeError: If a collective fails; it names the wave and the parameters.
        """
        timing = nullcontext if self._observer is None else self._observer.timing

        def meanwhile() -> None:
            with timing("coordinate"):
                self._adamw()
            for job in plan.local:
                with timing("local"):
                    self._task(job).advance()

        waves = [[self._task(job) for job in wave] for wave in plan.waves]
        run(waves, transport=transport, meanwhile=meanwhile, work=plan.work, progress=progress, timing=timing)

    def _task(self, job: Job) -> Task:
        observe_polar = None
        if self._observer is not None:
            observe_polar = partial(self._observer.factored, [self._role(self._specs[i].group) for i in job.members])
        task = job.task(partial(self._read, job), partial(self._write, job), observe_polar=observe_polar)
        task.names = [self._specs[i].name for i in job.members]
        return task

    def _adamw(self) -> None:
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
            decayed = [lr * decay * old for old in before]
            if cautious:
                decayed = [
                    part * decaying(old, old - new) for part, old, new in zip(decayed, before, wide, strict=True)
                ]
                torch._foreach_sub_(wide, decayed)
            for weight, stepped in zip(weights, wide, strict=True):
                if weight is not stepped:
                    weight.copy_(stepped)
            if self._observer is not None:
                parts = zip(wide, before, decayed, strict=True)
                self._observe(indices, [stepped - old + part for stepped, old, part in parts])

    def _read(self, job: Job) -> StepInputs:
        directions: dict[int, Tensor] = {}
        for group, indices in self._by_group(job.members):
            states = [self._local_state(i) for i in indices]
            gradients = [self._gradients[i].to(job.stack.dtype) for i in indices]
            directions.update(zip(indices, advance(job.stack.rule.accumulator, states, gradients, group), strict=True))
        job_states = [self._local_state(i) for i in job.members] if job.stack.state_names else []
        return StepInputs(
            directions=[directions[i] for i in job.members],
            gradients=[self._gradients[i] for i in job.members] if job.stack.skip_zero_grad_rows else None,
            states=tuple([state[name] for state in job_states] for name in job.stack.state_names),
        )

    def _write(self, job: Job, outputs: StepOutputs) -> None:
        """Subtract the updates and the decay from the weights, and store the rule's new state."""
        place_of = {index: place for place, index in enumerate(job.members)}
        for group, indices in self._by_group(job.members):
            places = [place_of[i] for i in indices]
            for name, field in zip(job.stack.state_names, outputs.states, strict=True):
                torch._foreach_copy_([self._local_state(i)[name] for i in indices], [field[place] for place in places])
            updates = [outputs.updates[place] for place in places]
            decay_and_subtract(
                [local(self._specs[i].parameter) for i in indices],
                updates,
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                cautious=group["cautious_weight_decay"],
                moving=None if outputs.moved is None else [outputs.moved[place] for place in places],
            )
            if self._observer is not None:
                self._observe(indices, torch._foreach_mul(updates, float(group["lr"])))

    def _observe(self, indices: list[int], steps: Iterable[Tensor]) -> None:
        assert self._observer is not None
        specs = [self._specs[i] for i in indices]
        self._observer.moved(
            self._role(specs[0].group),
            [spec.layout for spec in specs],
            [local(spec.parameter) for spec in specs],
            list(steps),
            padding_rows=self._groups[specs[0].group]["padding_rows"],
        )

    def _role(self, group: int) -> str:
        return self._groups[group]["role"] or self._groups[group]["rule"]

    def _by_group(self, indices: Iterable[int]) -> list[tuple[Mapping[str, Any], list[int]]]:
        by_group: dict[int, list[int]] = {}
        for i in indices:
            by_group.setdefault(self._specs[i].group, []).append(i)
        return [(self._groups[group], members) for group, members in by_group.items()]

    def _local_state(self, index: int) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self._state[self._specs[index].parameter].items()}
