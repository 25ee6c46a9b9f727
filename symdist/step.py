"""One optimizer step: gives jobs their inputs, and writes their results to weights and state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symdist.decay import decay_and_subtract, decaying
from symdist.exchange import Job, Plan, StepInputs, StepOutputs, StepProgress, Task, Transport, run
from symdist.gradients.momentum import adamw_step, advance
from symdist.param_specs import ParamSpec, members_of
from symdist.rounding import StochasticRounding, write

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor


def number_or_device(value: float | Tensor) -> float | Tensor:
    """Return a learning rate or decay as a number or, if it is a tensor on an accelerator, as it is.

    Reading a tensor on a CPU costs nothing; on an accelerator the host would wait for it.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.reshape(()).float()
    return float(value)


def check_capturable(
    groups: Sequence[Mapping[str, Any]], specs: Sequence[ParamSpec], *, nonfinite: str, observed: bool
) -> None:
    """Check that a step can be captured in a CUDA graph, which repeats launches and nothing that the host decides.

    Args:
        groups: The optimizer's param groups.
        specs: All its parameters.
        nonfinite: What happens if gradients are not finite.
        observed: Whether the step is measured.

    Raises:
        ValueError: Naming what would break it, and the remedy.
    """
    for group in groups:
        if group["weight_rounding"] == "stochastic" or group.get("state_dtype") is not None:
            raise ValueError(
                "capturable=True: a graph would round by the same chance in every step; round to the nearest"
            )
    if nonfinite == "raise":
        raise ValueError("capturable=True cannot raise in a graph; pass nonfinite='skip' or 'zero'")
    if observed:
        raise ValueError("capturable=True: a captured step cannot be measured; measure a step outside the graph")
    for group in groups:
        if group.get("method") == "exact":
            raise ValueError("capturable=True: an eigendecomposition waits for its result; choose another method")
        for key in ("lr", "weight_decay"):
            value = group[key]
            device = group["params"][0].device
            # The truth of a tensor would be read from the device.
            baked = value.device != device if isinstance(value, Tensor) else value != 0
            if device.type != "cpu" and baked:
                raise ValueError(
                    f"capturable=True: {key} of param group {group['role'] or group['param_names'][0]!r} is {value!r}, "
                    f"which a graph would keep for ever; make it a 0-d tensor on {device} and change that in place"
                )
    for spec in specs:
        if spec.parameter.requires_grad and spec.parameter.grad is None:
            raise ValueError(
                f"capturable=True: {spec.name} has no gradient; a graph needs every gradient, at one address: use "
                "zero_grad(set_to_none=False)"
            )


class Step:
    """Reads and writes an optimizer's weights and state for the jobs of one step.

    Args:
        specs: All parameters of the optimizer.
        groups: The optimizer's param groups.
        state: The state of every parameter, by parameter.
        gradients: This rank's piece of every parameter's gradient, in the order of `specs`.
        observer: Measures this step; None for a step without diagnostics.
        gate: 0-d float32 on the device of the weights: 1, or 0 for a step that changes nothing. None (default) for 1.
    """

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        gradients: Sequence[Tensor],
        observer: StepMonitor | None,
        *,
        gate: Tensor | None = None,
    ):
        self._specs = members_of(specs)
        self._groups = groups
        self._states = [own for spec in specs for own in _states_of(spec, state[spec.parameter])]
        pairs = zip(specs, gradients, strict=True)
        self._gradients = [member.of(gradient) for spec, gradient in pairs for member in spec.members]
        self._observer = observer
        self._gate = gate

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
            weights = [self._specs[i].of(self._specs[i].parameter) for i in indices]
            wide = [weight.to(self._specs[i].dtype) for i, weight in zip(indices, weights, strict=True)]
            lr, decay = self._rates(group)
            cautious = group["cautious_weight_decay"]
            apart = cautious or isinstance(decay, Tensor)
            before = [weight.clone() for weight in wide] if self._observer is not None or apart else []
            adamw_step(
                wide,
                [self._states[i] for i in indices],
                [self._gradients[i].to(self._specs[i].dtype) for i in indices],
                betas=group["betas"],
                eps=group["eps"],
                lr=number_or_device(group["lr"]),
                # AdamW's kernels take only a number.
                weight_decay=0.0 if apart else float(decay),
                gate=self._gate,
            )
            # The part of each weight's change that is decay, so that observers see the step without it.
            decayed = [lr * decay * old for old in before]
            if cautious:
                decayed = [
                    part * decaying(old, old - new) for part, old, new in zip(decayed, before, wide, strict=True)
                ]
            if apart:
                torch._foreach_sub_(wide, decayed)
            rounding = self._rounding(group)
            for i, weight, stepped in zip(indices, weights, wide, strict=True):
                if weight is stepped:
                    continue
                if rounding is None:
                    write(weight, stepped)
                else:
                    rounding.write(weight, stepped, key=self._specs[i].key)
            if self._observer is not None:
                parts = zip(wide, before, decayed, strict=True)
                self._observe(indices, [stepped - old + part for stepped, old, part in parts])

    def _read(self, job: Job) -> StepInputs:
        directions: dict[int, Tensor] = {}
        for group, indices in self._by_group(job.members):
            directions.update(zip(indices, self._advanced(job, group, indices), strict=True))
        job_states = [self._states[i] for i in job.members] if job.stack.state_names else []
        return StepInputs(
            directions=[directions[i] for i in job.members],
            gradients=[self._gradients[i] for i in job.members] if job.stack.skip_zero_grad_rows else None,
            states=tuple([state[name] for state in job_states] for name in job.stack.state_names),
        )

    def _advanced(self, job: Job, group: Mapping[str, Any], indices: Sequence[int]) -> list[Tensor]:
        """Update the momentum of parameters of a group, and return their directions."""
        states: list[Mapping[str, Tensor]] = [self._states[i] for i in indices]
        gradients = [self._gradients[i].to(job.stack.dtype) for i in indices]
        narrow = [state["momentum"] for state in states] if group.get("state_dtype") is not None else []
        if narrow:
            states = [{"momentum": momentum.to(job.stack.dtype)} for momentum in narrow]
        directions = advance(job.stack.rule.accumulator, states, gradients, group, self._gate)
        if narrow:
            keys = [("momentum", *self._specs[i].key) for i in indices]
            rounding = StochasticRounding(seed=group["rounding_seed"], step=group["rounding_step"])
            rounding.store(narrow, [state["momentum"] for state in states], keys=keys)
        return directions

    def _write(self, job: Job, outputs: StepOutputs) -> None:
        """Subtract the updates and the decay from the weights, and store the rule's new state."""
        place_of = {index: place for place, index in enumerate(job.members)}
        for group, indices in self._by_group(job.members):
            places = [place_of[i] for i in indices]
            for name, field in zip(job.stack.state_names, outputs.states, strict=True):
                self._store([self._states[i][name] for i in indices], [field[place] for place in places])
            updates = [outputs.updates[place] for place in places]
            lr, decay = self._rates(group)
            decay_and_subtract(
                [self._specs[i].of(self._specs[i].parameter) for i in indices],
                updates,
                lr=lr,
                weight_decay=decay,
                cautious=group["cautious_weight_decay"],
                moving=None if outputs.moved is None else [outputs.moved[place] for place in places],
                rounding=self._rounding(group),
                keys=[self._specs[i].key for i in indices],
            )
            if self._observer is not None:
                self._observe(indices, torch._foreach_mul(updates, lr))

    def _rates(self, group: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return the learning rate and the weight decay; the learning rate is 0 if the gate is."""
        lr = number_or_device(group["lr"])
        return lr if self._gate is None else lr * self._gate, number_or_device(group["weight_decay"])

    @staticmethod
    def _rounding(group: Mapping[str, Any]) -> StochasticRounding | None:
        """Return how weights of a group are rounded; None to round to the nearest."""
        if group["weight_rounding"] == "nearest":
            return None
        return StochasticRounding(seed=group["rounding_seed"], step=group["rounding_step"])

    def _store(self, state: list[Tensor], new: list[Tensor]) -> None:
        """Store new state, unless the gate is 0."""
        if self._gate is not None:
            gate = self._gate.to(state[0].dtype)
            kept = torch._foreach_mul(state, 1 - gate)
            new = list(torch._foreach_mul(new, gate))
            torch._foreach_add_(new, kept)
        torch._foreach_copy_(state, new)

    def _observe(self, indices: list[int], steps: Iterable[Tensor]) -> None:
        assert self._observer is not None
        specs = [self._specs[i] for i in indices]
        self._observer.moved(
            self._role(specs[0].group),
            [spec.layout for spec in specs],
            [spec.of(spec.parameter) for spec in specs],
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


def _states_of(spec: ParamSpec, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return this rank's pieces of the state of every member of a parameter."""
    states = [{key: member.of(value) for key, value in state.items()} for member in spec.members]
    # Every section counts the step, and the parameter's count must rise by one: a section that is stepped here has it.
    counts = next((i for i, member in enumerate(spec.members) if math.prod(member.layout.local_shape)), 0)
    for own in (*states[:counts], *states[counts + 1 :]):
        own.update({key: value.clone() for key, value in own.items() if not value.dim()})
    return states
