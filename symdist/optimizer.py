"""SymDist: every parameter under its own symmetry-compatible rule, on the shards where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symdist.assignment import Assignment, assignment
from symdist.exchange import CountingTransport, Plan, StepProgress, Strategy, TorchTransport, Transport, dry_run, run
from symdist.exchange.options import ExchangeLike, ExchangeOptions
from symdist.gradients.nonfinite import FLAGS, NonFinite, ranks_that_agree
from symdist.gradients.ready import ready_gradients
from symdist.layouts import Group
from symdist.layouts.groups import Ranks, group_of
from symdist.param_groups import (
    ParamGroup,
    ParamSpec,
    check_stages,
    defaults_for,
    plan_params,
    read_group,
    warn_of_narrow_weights,
)
from symdist.replaced_params import changed, in_model, taken_over
from symdist.state_checks import asked_by_pytorch, flattened_zeros, load_state
from symdist.step import Step

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor


class SymDist(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps each parameter by a rule, wherever its shards lie.

    All ranks that share parameters construct it and call its methods alike. A missing gradient is a zero gradient.
    State lies like its parameter, is complete from construction on, and is float32 or wider. Weights are read and
    written where they lie, in any strides, and nothing beside them is. Parameters may be replaced, in the groups or in
    `model`, as trainers do when they shard a model: at the next call of any method they are described anew, and their
    state comes along. A parameter that does not require a gradient does not move.

    Args:
        params: Parameters, `(name, parameter)` pairs, or param groups, dicts with the keys of `ParamGroup`. A 3-D
            parameter is a stack of matrices.
        rule: The rule of all parameters, or of the groups that name none; see `symdist.rule_names()`.
        lr: The learning rate, likewise. Rates of different rules have no common default.
        nonfinite: What all ranks do together when a gradient is inf or NaN on any: "raise" FloatingPointError before
            anything changes, "skip" the step (counted in `skipped_steps`), or "zero" the offending elements.
        exchange: How matrices travel between ranks, `ExchangeOptions` or a mapping of its keys.
        process_group: The ranks that must agree on gradients. Left out, all of the mesh that the parameters' meshes
            were sliced from, stages of a pipeline included; give it where parameters lie on unrelated meshes.
        replicate_group: The ranks on which plain tensors are the same, as under DDP; work on them is shared out.
        transport: Replaces the collectives, to count them.
        model: Looked at, before the first step and where no gradient comes, for parameters that were sharded after
            the optimizer was made.
        **options: Defaults of further keys of a group, of its rule's own options too: each holds for the groups whose
            rule knows it.

    Attributes:
        skipped_steps: How many steps were left out.

    Raises:
        TypeError: For a keyword that no group's rule knows.
        ValueError: Naming group or parameter and the remedy, for anything that cannot run exactly as asked.

    Example:
        >>> SymDist(model.named_parameters(), rule="muon", lr=1e-2, weight_decay=0.1)
        >>> SymDist([{"params": matrices, "rule": "muon"}, {"params": others, "rule": "adamw", "lr": 3e-4}], lr=1e-2)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[ParamGroup] | Iterable[dict[str, Any]],
        *,
        rule: str | None = None,
        lr: float | Tensor | None = None,
        nonfinite: NonFinite = "raise",
        exchange: ExchangeLike = None,
        process_group: Ranks | None = None,
        replicate_group: Ranks | None = None,
        transport: Transport | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ):
        if nonfinite not in ("raise", "skip", "zero"):
            raise ValueError(f"nonfinite={nonfinite!r} is not 'raise', 'skip' or 'zero'")
        self.nonfinite: NonFinite = nonfinite
        self.exchange = ExchangeOptions.of(exchange)
        self._process_group = group_of("process_group", process_group)
        self._replicate_group = group_of("replicate_group", replicate_group)
        self.transport: Transport = transport or TorchTransport()
        self.skipped_steps = 0
        self._observer: StepMonitor | None = None
        self._progress = StepProgress()
        self._skip_next = False
        self._specs: list[ParamSpec] = []
        self._planned: tuple[list[bool], Plan] | None = None
        self._peers: Group | None = None
        self._model = None if model is None else ref(model)
        self._fresh = True
        """No step has been taken, and nothing loaded: all state is zero."""
        # A set is refused with the reason where groups are read.
        given: Any = params if isinstance(params, Tensor | set | frozenset) else list(params)
        as_groups = isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given)
        groups = [dict(each) for each in given] if as_groups else [{"params": given}]
        defaults = {**({} if rule is None else {"rule": rule}), **({} if lr is None else {"lr": lr}), **options}
        self._constructed = False
        super().__init__(groups, defaults_for(groups, defaults))
        self.plan()
        self._constructed = True
        warn_of_narrow_weights(self._specs)
        # Schedulers that cycle momentum look for it here, and write it to every group.
        for key in ("momentum", "betas"):
            if all(key in group for group in self.param_groups):
                self.defaults[key] = self.param_groups[0][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completed by the defaults of construction; all ranks that share its parameters call it.

        Args:
            param_group: A dict with the keys of `ParamGroup`.

        Raises:
            ValueError: Naming group or parameter; nothing is added then.
        """
        self._follow()
        group, specs = read_group(
            param_group,
            index=len(self.param_groups),
            defaults=self.defaults,
            known=self._specs,
            replicas=self._replicate_group,
        )
        if self._constructed:
            plan_params(self._specs + specs, exchange=self.exchange)
        # The defaults are in it already, as far as its rule knows them; PyTorch would put in all.
        defaults, self.defaults = self.defaults, {}
        try:
            super().add_param_group(group)
        finally:
            self.defaults = defaults
        self._specs += specs
        self._planned = None
        for spec in specs:
            self.state[spec.parameter] = self._new_state(spec)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight once.

        Args:
            closure: Recomputes the loss, where given.

        Returns:
            What `closure` returned, or None.

        Raises:
            FloatingPointError: On every rank, where a gradient is not finite on any and `nonfinite` is "raise".
            ExchangeError: Of `symdist.exchange`; where a collective fails, with wave and parameters.
            ValueError: Where a group, a parameter or a gradient has become something that cannot be stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow(at_step=True)
        self._check_options()
        observer, self._observer = self._observer, None
        plan = self._plan()
        gradients = None
        if not self._skip_next:
            gradients = ready_gradients(
                self._specs,
                nonfinite=self.nonfinite,
                expected=self._fresh,
                peers=self._peers,
                transport=self.transport,
                progress=self._progress,
            )
        self._skip_next = False
        if gradients is None:
            self.skipped_steps += 1
            return loss
        self._fresh = False
        step = Step(self._specs, self.param_groups, self.state, gradients, observer)
        timing = nullcontext if observer is None else observer.timing

        def meanwhile() -> None:
            with timing("coordinate"):
                step.adamw()
            for job in plan.local:
                with timing("local"):
                    step.task(job).advance()

        waves = [[step.task(job) for job in wave] for wave in plan.waves]
        run(
            waves,
            transport=self.transport,
            meanwhile=meanwhile,
            work=plan.work,
            progress=self._progress,
            timing=timing,
        )
        return loss

    def skip_next_step(self, skip: bool = True) -> None:
        """Let the next `step()` change nothing, as one whose gradients are not finite; all ranks call it.

        Call it on a loss spike, before `step()`, where an engine drives the step and goes on as ever. The step is
        counted in `skipped_steps`.

        Args:
            skip: False takes it back.
        """
        self._skip_next = skip

    def progress(self) -> str:
        """Where a step that another thread runs is: its wave, the collective it waits for; empty between steps."""
        return self._progress.text()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, of the parameters that are trained now."""
        self._follow()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: complete from construction on.

        Under FSDP1 every parameter has a value for each state that any has, zeros where its rule keeps none:
        `FSDP.optim_state_dict` puts those of a unit together. They take no memory here, and are not loaded.
        """
        self._follow()
        found = super().state_dict()
        for i, zeros in flattened_zeros(self._specs, self.state).items():
            found["state"][i] = {**found["state"][i], **zeros}
        return found

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool | None = None) -> None:
        """Load what `state_dict` gave, or `torch.distributed.checkpoint.state_dict`; tensors keep dtype and device.

        Parameters are found by their names, whatever wrappers stand in these, or by their order where the saved run
        gave none. All ranks that share parameters call it.

        Args:
            state_dict: Raw, by names, or flattened.
            strict: False leaves the state of a parameter as it is where nothing was saved of it. Left out, it is what
                PyTorch's `StateDictOptions` says, or True.

        Raises:
            ValueError: By name and before anything changes, where groups, rules or state do not match.
        """
        self._follow()
        by_pytorch = asked_by_pytorch()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        written = load_state(
            self._specs,
            self.param_groups,
            self.state,
            state_dict,
            strict=by_pytorch is not False if strict is None else strict,
            matched=by_pytorch is not None,
        )
        self._fresh = self._fresh and not written
        self._planned = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def strategies(self) -> dict[str, Strategy]:
        """Where each parameter's rule runs, by name: "local", "reduce" or "owner"."""
        return {each.name: each.strategy for each in self.assignments()}

    def assignments(self) -> list[Assignment]:
        """What became of every parameter, in the order of the groups."""
        where = self.plan().strategies()
        return [
            assignment(spec, self.param_groups[spec.group], where.get(i, "local")) for i, spec in enumerate(self._specs)
        ]

    def plan(self) -> Plan:
        """Where everything runs, and in which waves: the same on all ranks that share parameters."""
        self._follow()
        return self._plan()

    def trace_collectives(self) -> CountingTransport:
        """Every collective of a step on this rank, in order: the step runs on meta tensors, and nothing moves.

        That is for gradients that lie where their weights do; putting others together takes further collectives.
        """
        plan, counting = self.plan(), CountingTransport()
        if self._peers is not None and self._peers.size > 1:
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=self._peers)
        dry_run(plan, counting)
        return counting

    def __repr__(self) -> str:
        lines = [
            f"  ({i}) {group['role'] or 'params'}: {group['rule']}, {len(group['params'])} parameters, "
            f"lr {float(group['lr']):g}, weight_decay {group['weight_decay']:g}"
            for i, group in enumerate(self.param_groups)
        ]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    def __getstate__(self) -> dict[str, Any]:
        """Refused: process groups do not copy."""
        raise TypeError("SymDist cannot be copied or pickled; build another and load_state_dict into it")

    def _plan(self) -> Plan:
        moving = [spec.parameter.requires_grad for spec in self._specs]
        if self._planned is None or self._planned[0] != moving:
            plan = plan_params(self._specs, exchange=self.exchange)
            self._peers = self._ranks_of(self._specs)
            check_stages(plan, self._peers)
            self.transport.prepare(plan.groups() | ({self._peers} if self._peers is not None else set()))
            self._planned = moving, plan
        return self._planned[1]

    def _ranks_of(self, specs: list[ParamSpec]) -> Group | None:
        """All ranks that must do alike in a step of these."""
        if self._process_group is not None:
            return self._process_group
        others = [spec.layout for spec in specs if not isinstance(spec.parameter, DTensor)]
        return ranks_that_agree([spec.parameter for spec in specs], others, replicas=self._replicate_group)

    def _follow(self, *, at_step: bool = False) -> None:
        """Take over parameters that have been replaced, or laid out anew, since they were described.

        Raises ValueError, on all ranks and before anything changes, where what is to become of them cannot be known.
        """
        if not self._constructed:
            return
        given = [parameter for group in self.param_groups for parameter in group["params"]]
        # Later on only where no gradient comes: then the model may have others.
        look = self._fresh or (at_step and all(parameter.grad is None for parameter in given))
        model = self._model() if self._model is not None and look else None
        if model is not None and len(given) == len(self._specs):
            given = in_model(model, self._specs, given)
        if len(given) == len(self._specs) and not any(map(changed, self._specs, given)):
            return
        specs, states = taken_over(
            self._specs,
            given,
            self.param_groups,
            self.state,
            new_state=self._new_state if self._fresh else None,
            replicas=self._replicate_group,
            exchange=self.exchange,
            peers_of=self._ranks_of,
            transport=self.transport,
        )
        self.state.clear()
        self.state.update({spec.parameter: state for spec, state in zip(specs, states, strict=True)})
        place = iter(given)
        for group in self.param_groups:
            group["params"] = [next(place) for _ in group["params"]]
        self._specs, self._planned = specs, None

    def _check_options(self) -> None:
        """ValueError for a rule's option that was changed after construction: it would be ignored."""
        stacks = {spec.group: spec.stack for spec in self._specs if spec.stack is not None}
        for i, stack in stacks.items():
            group = self.param_groups[i]
            fixed = {**dict(stack.options), "padding_rows": stack.padding_rows}
            fixed["skip_zero_grad_rows"] = stack.skip_zero_grad_rows
            found = [key for key, value in fixed.items() if group[key] != value]
            if found:
                raise ValueError(
                    f"param group {group['role'] or group['param_names'][0]!r}: {', '.join(found)} changed after "
                    "construction; build another optimizer and load_state_dict into it"
                )

    def _new_state(self, spec: ParamSpec) -> dict[str, Tensor]:
        state = {
            key: torch.zeros_like(spec.parameter, dtype=spec.dtype, requires_grad=False)
            for key in spec.rule.state_names(self.param_groups[spec.group])
        }
        if spec.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=spec.parameter.device)
        return state
