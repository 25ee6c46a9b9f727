"""SymDist, the optimizer: steps every parameter by its own symmetry-compatible rule, on the shards where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from symdist.assignment import Assignment, assignment
from symdist.exchange import CountingTransport, Plan, StepProgress, Strategy, TorchTransport, Transport, dry_run
from symdist.exchange.options import ExchangeLike, ExchangeOptions
from symdist.gradients.nonfinite import FLAGS, NonFinite, Unread, may_read, not_finite_error, share
from symdist.gradients.ready import ready_gradients
from symdist.layouts.groups import Ranks, group_of
from symdist.param_groups import ParamGroup, as_groups, check_unchanged, defaults_for, read_group
from symdist.param_specs import ParamSpec, members_of, warn_of_narrow_weights
from symdist.replaced_params import replacements, taken_over
from symdist.state_checks import asked_by_pytorch, flattened_zeros, load_state
from symdist.step import Step, check_capturable
from symdist.step_plan import StepPlanner, plan_params

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor


class SymDist(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps each parameter by its rule, wherever its shards lie.

    All ranks that share parameters construct it and call its methods alike. A missing gradient counts as zero; a
    parameter that requires none does not move. State is placed like its parameter, complete from construction on, and
    float32 or wider. Trainers may replace parameters, in the groups or in `model`, when they shard a model: the next
    call of any method describes them anew and carries their state over.

    Args:
        params: Parameters, `(name, parameter)` pairs, or param groups, dicts with the keys of `ParamGroup`. A 3-D
            parameter is a stack of matrices.
        rule: The rule of all parameters, or of the groups that name none; see `symdist.rule_names()`.
        lr: The learning rate, likewise. Rates of different rules have no common default.
        nonfinite: What all ranks do together if a gradient is inf or NaN on any: "raise" (default) FloatingPointError
            before anything changes, "skip" the step (counted in `skipped_steps`), or set those elements to "zero". On
            an accelerator no step waits to know: such a step changes nothing either, and the error comes with the next
            step, or whenever the optimizer is asked for its state before.
        capturable: Whether steps are to be captured in a CUDA graph: then learning rates and decays must be 0-d tensors
            on the device, `nonfinite` "skip" or "zero", and every gradient there. On a CPU, steps read nothing back, as
            on an accelerator. False by default.
        exchange: How matrices travel between ranks, `ExchangeOptions` or a mapping of its keys.
        process_group: The ranks that must agree on gradients. By default the whole mesh that the parameters' meshes
            were sliced from, pipeline stages included; give it if parameters lie on unrelated meshes.
        replicate_group: The ranks that hold identical plain tensors, as under DDP, and share the work on them.
        transport: Replaces the collectives, to count them.
        model: The model to look in for parameters that were sharded after the optimizer was built.
        **options: Defaults of further keys of a group, options of its rule included. Each applies to the groups whose
            rule has it.

    Attributes:
        skipped_steps: The number of steps that were skipped; reading it waits for the device.

    Raises:
        TypeError: If no group's rule has a keyword.
        ValueError: Naming the group or parameter and the remedy, if anything cannot run exactly as asked.
        PlanError: Of `symdist.exchange`, on all ranks, if ranks that must run the same collectives plan different ones,
            as where their recipes differ.

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
        capturable: bool = False,
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
        self.transport: Transport = transport or TorchTransport()
        self.capturable = capturable
        self._skipped = 0
        self._unread = Unread()
        self._planner = StepPlanner(
            exchange=self.exchange,
            transport=self.transport,
            process_group=group_of("process_group", process_group),
            replicate_group=group_of("replicate_group", replicate_group),
        )
        self._observer: StepMonitor | None = None
        self._progress = StepProgress()
        self._skip_next = False
        self._specs: list[ParamSpec] = []
        self._model = None if model is None else ref(model)
        self._fresh = True
        """Whether all state is zero: no step was taken and nothing was loaded."""
        groups = as_groups(params)
        defaults = {**({} if rule is None else {"rule": rule}), **({} if lr is None else {"lr": lr}), **options}
        self._constructed = False
        super().__init__(groups, defaults_for(groups, defaults))
        self._compare_plans()
        self._constructed = True
        warn_of_narrow_weights(self._specs, self.param_groups)
        # Schedulers that cycle momentum look for it here, and write it to every group.
        for key in ("momentum", "betas"):
            if all(key in group for group in self.param_groups):
                self.defaults[key] = self.param_groups[0][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completed by the defaults of construction; all ranks that share its parameters call it.

        Args:
            param_group: A dict with the keys of `ParamGroup`.

        Raises:
            ValueError: Naming the group or parameter. Nothing is added then.
        """
        self._follow()
        group, specs = read_group(
            param_group,
            index=len(self.param_groups),
            defaults=self.defaults,
            known=self._specs,
            replicas=self._planner.replicate_group,
        )
        if self._constructed:
            plan_params(self._specs + specs, exchange=self.exchange)
        # PyTorch would add all defaults. Those that the group's rule has are in it already.
        defaults, self.defaults = self.defaults, {}
        try:
            super().add_param_group(group)
        finally:
            self.defaults = defaults
        self._specs += specs
        self._planner.forget()
        for spec in specs:
            self.state[spec.parameter] = self._new_state(spec)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight once; all ranks that share parameters call it.

        Args:
            closure: Recomputes the loss; None (default) if gradients are ready.

        Returns:
            What `closure` returned, or None.

        Raises:
            FloatingPointError: On every rank, if a gradient is not finite on any and `nonfinite` is "raise".
            ExchangeError: Of `symdist.exchange`, if a collective fails; it names the wave and the parameters.
            ValueError: If a group, a parameter or a gradient has become something that cannot be stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._unread.check()
        self._follow(at_step=True)
        check_unchanged(self.param_groups, self._specs)
        observer, self._observer = self._observer, None
        plan = self._planner.plan(self._specs)
        skip, self._skip_next = self._skip_next, False
        if skip:
            self._skipped += 1
            return loss
        if self.capturable:
            check_capturable(self.param_groups, self._specs, nonfinite=self.nonfinite, observed=observer is not None)
        read = self._reads()
        gradients = ready_gradients(
            self._specs,
            nonfinite=self.nonfinite,
            expected=self._fresh,
            peers=self._planner.peers,
            transport=self.transport,
            progress=self._progress,
            read=read,
        )
        gate = None
        if (agreed := gradients.agreed) is not None:
            names = [spec.name for spec in self._specs]
            if not read:
                gate = agreed.finite
                if self.nonfinite == "skip":
                    self._unread.skipped(agreed.finite)
                else:
                    self._unread.keep(agreed, names)
            elif not agreed.finite and self.nonfinite == "raise":
                raise not_finite_error(agreed.norms, names)
            elif not agreed.finite:
                self._skipped += 1
                return loss
        self._fresh = False
        step = Step(self._specs, self.param_groups, self.state, gradients.pieces, observer, gate=gate)
        step.run(plan, transport=self.transport, progress=self._progress)
        for group in self.param_groups:
            group["rounding_step"] += group["weight_rounding"] == "stochastic" or group.get("state_dtype") is not None
        return loss

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped; reading it waits for the device."""
        self._skipped += self._unread.take_count()
        return self._skipped

    def _reads(self) -> bool:
        """Return whether a step may read numbers of its tensors, which costs nothing on a CPU."""
        return not self.capturable and may_read(spec.parameter for spec in self._specs)

    def skip_next_step(self, skip: bool = True) -> None:
        """Make the next `step()` change nothing, as if a gradient were not finite; all ranks call it.

        On a loss spike, call it before `step()`. The step is counted in `skipped_steps`.

        Args:
            skip: False takes back an earlier call.
        """
        self._skip_next = skip

    def progress(self) -> str:
        """Return which wave and collective a step in another thread is waiting for; empty between steps."""
        return self._progress.text()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as every optimizer of PyTorch does, of the parameters as they are now."""
        self._follow()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as PyTorch's optimizers do; complete from construction on.

        Under FSDP1, every parameter gets zeros for states that only other rules have, because
        `FSDP.optim_state_dict` joins the parameters of a unit. They take no memory, and loading ignores them.
        """
        self._unread.check()
        self._follow()
        state_dict = super().state_dict()
        for i, zeros in flattened_zeros(self._specs, self.state).items():
            state_dict["state"][i] = {**state_dict["state"][i], **zeros}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool | None = None) -> None:
        """Load what `state_dict` or `torch.distributed.checkpoint.state_dict` returned; dtypes and devices stay.

        Parameters are matched by names, without what wrappers add to them, or by order if the saved run had none. All
        ranks that share parameters call it.

        Args:
            state_dict: The saved state: raw, keyed by names, or flattened.
            strict: False to leave the state of parameters without saved state unchanged. By default as PyTorch's
                `StateDictOptions` say, or True.

        Raises:
            ValueError: Naming what does not match, before anything changes.
        """
        self._follow()
        by_pytorch = asked_by_pytorch()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        loaded = load_state(
            self._specs,
            self.param_groups,
            self.state,
            state_dict,
            strict=by_pytorch is not False if strict is None else strict,
            matched=by_pytorch is not None,
        )
        self._fresh = self._fresh and not loaded
        self._planner.forget()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def strategies(self) -> dict[str, Strategy]:
        """Return where each parameter's rule runs, by name: "local", "reduce" or "owner"; of sections, each its own."""
        return {entry.name: entry.strategy for entry in self.assignments()}

    def assignments(self) -> list[Assignment]:
        """Return how every parameter, or each of its sections, is stepped, in the order of the groups."""
        plan = self.plan()
        strategies, precisions = plan.strategies(), plan.precisions()
        return [
            assignment(spec, self.param_groups[spec.group], strategies.get(i, "local"), precisions.get(i, ""))
            for i, spec in enumerate(members_of(self._specs))
        ]

    def plan(self) -> Plan:
        """Return where everything runs, and in which waves; the same on all ranks that share parameters."""
        self._follow()
        return self._planner.plan(self._specs)

    def trace_collectives(self) -> CountingTransport:
        """Return every collective of a step on this rank, in order, by running it on meta tensors; nothing is sent.

        Gradients that are placed differently from their weights would need further collectives.
        """
        plan, counting = self.plan(), CountingTransport()
        share(torch.empty(FLAGS, device="meta"), self._planner.peers, counting)
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
        """Refuse to be copied, because process groups cannot be."""
        raise TypeError("SymDist cannot be copied or pickled; build another and load_state_dict into it")

    def _compare_plans(self) -> None:
        self._planner.agree(self._specs)

    def _follow(self, *, at_step: bool = False) -> None:
        """Take over parameters that were replaced or sharded anew; ValueError on all ranks if that is not possible."""
        if not self._constructed:
            return
        model = None
        # After the first step, the model is looked at only if no gradient arrives: it may have other parameters by now.
        if self._model is not None and (
            self._fresh or (at_step and all(p.grad is None for group in self.param_groups for p in group["params"]))
        ):
            model = self._model()
        parameters = replacements(self._specs, self.param_groups, model)
        if parameters is None:
            return
        new_state = self._new_state if self._fresh else None
        specs, states = taken_over(
            self._specs, parameters, self.param_groups, self.state, new_state=new_state, planner=self._planner
        )
        self.state.clear()
        self.state.update({spec.parameter: state for spec, state in zip(specs, states, strict=True)})
        remaining = iter(parameters)
        for group in self.param_groups:
            group["params"] = [next(remaining) for _ in group["params"]]
        self._specs = specs
        self._planner.forget()

    def _new_state(self, spec: ParamSpec) -> dict[str, Tensor]:
        state = {key: spec.zeros(key) for key in spec.rule.state_names(self.param_groups[spec.group])}
        if spec.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=spec.parameter.device)
        return state
