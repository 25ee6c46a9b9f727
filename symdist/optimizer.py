"""SymDist: every parameter under its own symmetry-compatible rule, on the shards where it lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symdist.assignment import Assignment, routed
from symdist.exchange import (
    CountingTransport,
    FlatJob,
    Job,
    Plan,
    StepInputs,
    StepOutputs,
    StepProgress,
    Strategy,
    Task,
    TorchTransport,
    Transport,
    dry_run,
    run,
)
from symdist.gradients.momentum import adamw_step, advance, inward
from symdist.gradients.nonfinite import FLAGS, Agreed, NonFinite, agree, not_finite_error, ranks_that_agree, zeroed
from symdist.gradients.partial_sums import bring_home, sum_up
from symdist.layouts import Group, group_from, local
from symdist.layouts.fsdp1 import is_flattened
from symdist.param_groups import ParamSpec, check_stages, describe_member, gradient_of, plan_step, with_defaults
from symdist.replaced_params import carried, changed, check_shapes, in_model
from symdist.state_checks import as_tensor, asked_by_pytorch, check_state, read_saved

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor

BUCKET_BYTES = 1 << 30


class SymDist(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over groups that each name a rule.

    A group is a dict: `params` (parameters, or `(name, parameter)` pairs), `rule`, `lr`, `weight_decay`,
    `cautious_weight_decay` (decay only those weights that their update takes towards zero, too), `view`,
    `skip_zero_grad_rows`, `strategy`, `padding_rows`, the rule's own options, and `role` and `names` for the reader. A
    3-D parameter is a stack of matrices. `layouts`, where given, has for each parameter None or where it lies; of a
    `FlatLayout` every rank gives its piece, an empty vector where it holds nothing.

    A missing gradient is a zero gradient. State lies like its parameter, is complete from construction on, and is
    float32 or wider. `lr`, the decay and what the momentum is told may change between steps; the rule's own
    options and the view are those of construction.

    `nonfinite` says what all ranks do together when a gradient is inf or NaN on any: "raise" FloatingPointError before
    anything changes, "skip" the step (counted in `skipped_steps`), or "zero" the offending elements. "All ranks" are
    `world`, a process group or mesh; left out, all of the mesh that the parameters' meshes were sliced from, stages
    of a pipeline included. `replicas`, a process group or mesh, says that plain tensors are the same on its ranks, as
    under DDP: work on them is then shared out. `communication_dtype`, bfloat16 say, is what matrices travel as to their
    owners and back; sums and Grams travel as they are. `bucket_bytes` bounds the buffers in flight. `transport`
    replaces the collectives, to count them. A parameter that does not require a gradient does not move. `model`, where
    given, is looked at, before the first step and where no gradient comes, for parameters that were sharded after the
    optimizer was made.

    Parameters may be replaced, in the groups or in `model`, as trainers do when they shard a model: at the next call of
    any method they are described anew, and their state comes along. Weights are read and written where they lie, in
    any strides, and nothing beside them is.

    Raises ValueError, naming group or parameter and the remedy, for anything it cannot run exactly as asked.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        nonfinite: NonFinite = "raise",
        bucket_bytes: int = BUCKET_BYTES,
        communication_dtype: torch.dtype | None = None,
        world: Any = None,
        replicas: Any = None,
        transport: Transport | None = None,
        model: nn.Module | None = None,
    ):
        if nonfinite not in ("raise", "skip", "zero"):
            raise ValueError(f"nonfinite={nonfinite!r} is not 'raise', 'skip' or 'zero'")
        if bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes={bucket_bytes} must be positive")
        if communication_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"communication_dtype={communication_dtype} must be torch.bfloat16, torch.float32, or None for "
                "the dtype of "
                "the state; float16 would lose small gradients"
            )
        self.nonfinite: NonFinite = nonfinite
        self.bucket_bytes = bucket_bytes
        self.communication_dtype = communication_dtype
        self._world = _group("world", world)
        self._replicas = _group("replicas", replicas)
        self.transport: Transport = transport or TorchTransport()
        self.skipped_steps = 0
        self.observer: StepMonitor | None = None
        """What measures the next step, and that one only."""
        self._trail = StepProgress()
        self._skip_next = False
        self._members: list[ParamSpec] = []
        self._planned: tuple[list[bool], Plan] | None = None
        self._peers: Group | None = None
        self._model = None if model is None else ref(model)
        self._fresh = True
        """No step has been taken, and nothing loaded: all state is zero."""
        groups = list(params)
        if not all(isinstance(group, Mapping) for group in groups):
            raise ValueError("SymDist takes param groups, dicts with a 'rule'; symdist.route(model, recipe) makes them")
        self._constructed = False
        super().__init__(groups, {})
        self.plan()
        self._constructed = True
        _warn_of_narrow_weights(self._members)
        # Schedulers that cycle momentum look for it here, and write it to every group.
        for key in ("momentum", "betas"):
            if all(key in group for group in self.param_groups):
                self.defaults[key] = self.param_groups[0][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after construction; nothing is added where it raises ValueError."""
        self._follow()
        group = dict(param_group)
        if "params" not in group:
            raise ValueError(f"a param group needs 'params'; this one has {', '.join(map(repr, group))}")
        params = group["params"]
        group["names"], params = _named(params, group)
        first = len(self._members)
        names = list(group["names"] or (f"param_{first + i}" for i in range(len(params))))
        if len(names) != len(params):
            raise ValueError(f"a param group has {len(params)} params but {len(names)} names")
        if not params:
            raise ValueError(f"param group {group.get('role', '')!r} has no parameters")
        layouts = list(group.pop("layouts", None) or [None] * len(params))
        if len(layouts) != len(params):
            raise ValueError(f"a param group has {len(params)} params but {len(layouts)} layouts")
        group |= {"params": params, "names": names}
        group = with_defaults(group)
        known = {id(member.parameter): member.name for member in self._members}
        members = []
        for name, parameter, layout in zip(names, params, layouts, strict=True):
            if id(parameter) in known:
                raise ValueError(f"{name} is given twice: it is {known[id(parameter)]} of another place or group")
            if parameter.is_meta:
                raise ValueError(
                    f"{name} is on the meta device; materialise it (to_empty) before building the optimizer"
                )
            known[id(parameter)] = name
            index = len(self.param_groups)
            members.append(
                describe_member(parameter, name=name, index=index, group=group, replicas=self._replicas, layout=layout)
            )
        if self._constructed:
            plan_step(self._members + members, bucket_bytes=self.bucket_bytes)
        super().add_param_group(group)
        self._members += members
        self._planned = None
        for member in members:
            self.state[member.parameter] = self._new_state(member)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight once. `closure`, where given, recomputes the loss, which is returned.

        Raises FloatingPointError on every rank where a gradient is not finite on any and `nonfinite` is "raise", and
        `symdist.exchange.ExchangeError`, which names wave and parameters, where a collective fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow(at_step=True)
        self._check_options()
        observer, self.observer = self.observer, None
        if self._skip_next:
            self._skip_next = False
            self.skipped_steps += 1
            return loss
        plan = self._plan()
        timing = nullcontext if observer is None else observer.timing
        gradients = self._gradients()
        if gradients is None:
            self.skipped_steps += 1
            return loss
        self._fresh = False

        def meanwhile() -> None:
            with timing("coordinate"):
                self._step_plain(gradients, observer)
            for job in plan.local:
                with timing("local"):
                    self._task(job, gradients, observer).advance()

        waves = [[self._task(job, gradients, observer) for job in wave] for wave in plan.waves]
        run(
            waves,
            transport=self.transport,
            meanwhile=meanwhile,
            work=plan.work,
            trail=self._trail,
            timing=timing,
        )
        return loss

    def _gradients(self) -> list[Tensor] | None:
        """This rank's, placed like their weights and finite, as all ranks agree; None where the step is left out."""
        moving = [(member.name, member.parameter) for member in self._members if member.parameter.requires_grad]
        some = any(parameter.grad is not None for _, parameter in moving)
        away = {id(parameter) for _, parameter in bring_home(moving)}
        here = [gradient_of(member) for member in self._members if id(member.parameter) not in away]
        agreed = self._agree(here, elsewhere=bool(away), some=some)
        if self._fresh and not agreed.any and moving:
            raise ValueError(
                "no parameter of any rank has a gradient in the first step: was the optimizer built before the model "
                "was sharded (fully_shard, prepare), or of another model? Build it afterwards, with "
                "symdist.build_optimizer(model, recipe)"
            )
        gradients = here
        if agreed.elsewhere:
            self._trail.before = "putting together gradients that lie otherwise than their weights"
            sum_up(moving, transport=self.transport)
            gradients = [gradient_of(member) for member in self._members]
            agreed = self._agree(gradients, elsewhere=False, some=some)
        self._trail.before = ""
        if self.nonfinite == "zero":
            return [zeroed(gradient) for gradient in gradients]
        if not agreed.finite and self.nonfinite == "raise":
            raise not_finite_error(gradients, [member.name for member in self._members])
        return gradients if agreed.finite else None

    def _agree(self, gradients: list[Tensor], *, elsewhere: bool, some: bool) -> Agreed:
        self._trail.before = "agreeing on whether gradients are finite"
        return agree(gradients, self._peers, elsewhere=elsewhere, some=some, transport=self.transport)

    def skip_next(self, skip: bool = True) -> None:
        """Leave the next step out, gradients and all, as one that is not finite; or not, after all. All ranks call it.

        It is counted in `skipped_steps`. Meant for a loss that jumps: what drives the step, be it an engine, goes on
        as ever.
        """
        self._skip_next = skip

    def where(self) -> str:
        """Where a step that another thread runs is: its wave, the collective it waits for; empty between steps."""
        return self._trail.where()

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
        pieces = [i for i, member in enumerate(self._members) if is_flattened(member.parameter)]
        names = {key for i in pieces for key in self.state[self._members[i].parameter]} - {"step"}
        for i in pieces:
            zero = torch.zeros(1, dtype=self._members[i].dtype, device=self._members[i].parameter.device)
            absent = names - set(found["state"][i])
            fill = dict.fromkeys(sorted(absent), zero.expand(self._members[i].parameter.shape))
            found["state"][i] = {**found["state"][i], **fill}
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Refused: process groups do not copy."""
        raise TypeError("SymDist cannot be copied or pickled; build another and load_state_dict into it")

    def strategies(self) -> dict[str, Strategy]:
        """Where each parameter's rule runs, by name."""
        where = self.plan().strategies()
        return {member.name: where.get(i, "local") for i, member in enumerate(self._members)}

    def routing(self) -> list[Assignment]:
        """What became of every parameter, in the order of the groups."""
        where = self.plan().strategies()
        return [
            routed(member, self.param_groups[member.group], where.get(i, "local"))
            for i, member in enumerate(self._members)
        ]

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool | None = None) -> None:
        """Load what `state_dict` gave, or `torch.distributed.checkpoint.state_dict`; tensors keep dtype and device.

        Parameters are found by their names, whatever wrappers stand in these, or by their order where the saved run
        gave none. With `strict=False` a parameter that nothing was saved of keeps its state; left out, it is what
        PyTorch's `StateDictOptions` says, or True.

        Raises ValueError, by name and before anything changes, where groups, rules or state do not match.
        """
        self._follow()
        by_pytorch = asked_by_pytorch()
        if strict is None:
            strict = by_pytorch is not False
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        names = [group["names"] for group in self.param_groups]
        saved = read_saved(self.param_groups, names, state_dict, strict=strict, matched=by_pytorch is not None)
        pairs: list[tuple[Tensor, Tensor]] = []
        for member, theirs in zip(self._members, saved.states, strict=True):
            mine = self.state[member.parameter]
            # Flattened state has empty values for what was not saved; `set_state_dict` leaves out what is frozen here.
            theirs = {key: value for key, value in theirs.items() if as_tensor(value) is not None}
            # Of a parameter that FSDP1 has no piece of here, it has no state here either.
            nothing = is_flattened(member.parameter) and member.parameter.numel() == 0
            if theirs or (strict and member.parameter.requires_grad and not nothing):
                check_state(member.name, mine, theirs)
                pairs += [
                    (tensor, value) for key, tensor in mine.items() if (value := as_tensor(theirs[key])) is not None
                ]
        for group, theirs, mine in zip(self.param_groups, saved.groups, names, strict=True):
            # Names are not loaded: the saved ones may be those of a pipeline stage.
            group.update({key: value for key, value in theirs.items() if key not in ("params", "names", "param_names")})
            assert group["names"] is mine
        for tensor, value in pairs:
            # A trainer may load what it has just been given: then there is nothing to load.
            if value is not tensor:
                local(tensor).copy_(local(value))
                self._fresh = False
        self._planned = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def plan(self) -> Plan:
        """Where everything runs, and in which waves: the same on all ranks that share parameters."""
        self._follow()
        return self._plan()

    def _plan(self) -> Plan:
        moving = [member.parameter.requires_grad for member in self._members]
        if self._planned is None or self._planned[0] != moving:
            plan = plan_step(
                self._members, bucket_bytes=self.bucket_bytes, communication_dtype=self.communication_dtype
            )
            self._peers = self._ranks_of(self._members)
            check_stages(plan, self._peers)
            self.transport.prepare(plan.groups() | ({self._peers} if self._peers is not None else set()))
            self._planned = moving, plan
        return self._planned[1]

    def _ranks_of(self, members: list[ParamSpec]) -> Group | None:
        """All ranks that must do alike in a step of these."""
        if self._world is not None:
            return self._world
        others = [member.layout for member in members if not isinstance(member.parameter, DTensor)]
        return ranks_that_agree([member.parameter for member in members], others, replicas=self._replicas)

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
        if model is not None and len(given) == len(self._members):
            given = in_model(model, self._members, given)
        if len(given) != len(self._members) or any(map(changed, self._members, given)):
            self._take_over(given)

    @torch.no_grad()
    def _take_over(self, given: list[Tensor]) -> None:
        check_shapes(self._members, given)
        members, states, problem = [], [], None
        for old, parameter in zip(self._members, given, strict=True):
            if not changed(old, parameter):
                members.append(old)
                states.append(self.state[old.parameter])
                continue
            group = self.param_groups[old.group]
            new = describe_member(parameter, name=old.name, index=old.group, group=group, replicas=self._replicas)
            members.append(new)
            try:
                state = self._new_state(new) if self._fresh else carried(old, new, self.state[old.parameter])
            except ValueError as error:
                state, problem = {}, problem or error
            states.append(state)
        plan_step(members, bucket_bytes=self.bucket_bytes)
        # Whether values were kept is each rank's own to see, and all must do alike.
        failed = torch.tensor([float(problem is not None)], device=given[0].device)
        peers = self._ranks_of(members)
        if peers is not None and peers.size > 1:
            self.transport.prepare({peers})
            self.transport.all_reduce(failed, group=peers).wait()
        if problem is not None:
            raise problem
        if bool(failed):
            raise ValueError("another rank could not take over its parameters, and says why")
        self.state.clear()
        self.state.update({member.parameter: state for member, state in zip(members, states, strict=True)})
        place = iter(given)
        for group in self.param_groups:
            group["params"] = [next(place) for _ in group["params"]]
        self._members, self._planned = members, None

    def trace_collectives(self) -> CountingTransport:
        """Every collective of a step on this rank, in order: the step runs on meta tensors, and nothing moves.

        That is for gradients that lie where their weights do; putting others together takes further collectives.
        """
        plan, counting = self.plan(), CountingTransport()
        if self._peers is not None and self._peers.size > 1:
            counting.all_reduce(torch.empty(FLAGS, device="meta"), group=self._peers)
        dry_run(plan, counting)
        return counting

    def _check_options(self) -> None:
        """ValueError for a rule's option that was changed after construction: it would be ignored."""
        stacks = {member.group: member.stack for member in self._members if member.stack is not None}
        for i, stack in stacks.items():
            group = self.param_groups[i]
            fixed = {**dict(stack.options), "padding_rows": stack.padding_rows}
            fixed["skip_zero_grad_rows"] = stack.skip_zero_grad_rows
            changed = [key for key, value in fixed.items() if group[key] != value]
            if changed:
                raise ValueError(
                    f"param group {group['role'] or group['names'][0]!r}: {', '.join(changed)} changed after "
                    "construction; build another optimizer and load_state_dict into it"
                )

    def _new_state(self, member: ParamSpec) -> dict[str, Tensor]:
        state = {
            key: torch.zeros_like(member.parameter, dtype=member.dtype, requires_grad=False)
            for key in member.rule.state_names(self.param_groups[member.group])
        }
        if member.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=member.parameter.device)
        return state

    def _task(self, job: Job | FlatJob, gradients: list[Tensor], observer: StepMonitor | None) -> Task:
        note = None
        if observer is not None:
            note = partial(observer.rooted, [self._role(self._members[i].group) for i in job.members])
        task = job.task(partial(self._begin, job, gradients), partial(self._move, job, observer), note=note)
        task.names = [self._members[i].name for i in job.members]
        return task

    def _role(self, group: int) -> str:
        return self.param_groups[group]["role"] or self.param_groups[group]["rule"]

    def _observe(self, observer: StepMonitor, members: list[int], steps: Iterable[Tensor]) -> None:
        found = [self._members[i] for i in members]
        weights = [local(member.parameter) for member in found]
        group = found[0].group
        padding = self.param_groups[group]["padding_rows"]
        layouts = [member.layout for member in found]
        observer.moved(self._role(group), layouts, weights, list(steps), padding_rows=padding)

    def _by_group(self, indices: Iterable[int]) -> list[tuple[dict[str, Any], list[int]]]:
        by_group: dict[int, list[int]] = {}
        for i in indices:
            by_group.setdefault(self._members[i].group, []).append(i)
        return [(self.param_groups[group], members) for group, members in by_group.items()]

    def _begin(self, job: Job | FlatJob, gradients: list[Tensor]) -> StepInputs:
        directions: dict[int, Tensor] = {}
        for group, members in self._by_group(job.members):
            states = [self._local_state(i) for i in members]
            given = [gradients[i].to(job.stack.dtype) for i in members]
            directions.update(zip(members, advance(job.stack.rule.accumulator, states, given, group), strict=True))
        remembered = [self._local_state(i) for i in job.members] if job.stack.state_names else []
        return StepInputs(
            directions=[directions[i] for i in job.members],
            gradients=[gradients[i] for i in job.members] if job.stack.skip_zero_grad_rows else None,
            states=tuple([state[name] for state in remembered] for name in job.stack.state_names),
        )

    def _local_state(self, index: int) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self.state[self._members[index].parameter].items()}

    def _step_plain(self, gradients: list[Tensor], observer: StepMonitor | None) -> None:
        plain = [i for i, m in enumerate(self._members) if m.stack is None and m.parameter.requires_grad]
        for group, members in self._by_group(plain):
            weights = [local(self._members[i].parameter) for i in members]
            wide = [weight.to(self._members[i].dtype) for i, weight in zip(members, weights, strict=True)]
            lr, decay, cautious = float(group["lr"]), group["weight_decay"], group["cautious_weight_decay"]
            before = [weight.clone() for weight in wide] if observer is not None or cautious else []
            adamw_step(
                wide,
                [self._local_state(i) for i in members],
                [gradients[i].to(self._members[i].dtype) for i in members],
                betas=group["betas"],
                eps=group["eps"],
                lr=lr,
                weight_decay=0.0 if cautious else decay,
            )
            # What the weights lose by themselves, without the step.
            lost = [lr * decay * old for old in before]
            if cautious:
                lost = [of * inward(old, old - new) for of, old, new in zip(lost, before, wide, strict=True)]
                torch._foreach_sub_(wide, lost)
            for weight, stepped in zip(weights, wide, strict=True):
                if weight is not stepped:
                    weight.copy_(stepped)
            if observer is not None:
                parts = zip(wide, before, lost, strict=True)
                self._observe(observer, members, [stepped - old + of for stepped, old, of in parts])

    def _move(self, job: Job | FlatJob, observer: StepMonitor | None, made: StepOutputs) -> None:
        """Decoupled decay first, then the update; and what the rule remembers."""
        updates, moved = made.updates, made.moved
        place_of = {member: place for place, member in enumerate(job.members)}
        for group, members in self._by_group(job.members):
            lr, decay = float(group["lr"]), group["weight_decay"]
            places = [place_of[i] for i in members]
            weights = [local(self._members[i].parameter) for i in members]
            chosen = [updates[place] for place in places]
            for name, layer in zip(job.stack.state_names, made.states, strict=True):
                torch._foreach_copy_([self._local_state(i)[name] for i in members], [layer[place] for place in places])
            if moved is not None or (decay and group["cautious_weight_decay"]):
                for weight, update, place in zip(weights, chosen, places, strict=True):
                    kept: Tensor | float = 1.0 if moved is None else moved[place]
                    if group["cautious_weight_decay"]:
                        kept = kept * inward(weight, update)
                    weight.copy_(weight * (1 - lr * decay * kept) - lr * update)
            elif weights[0].dtype != chosen[0].dtype:
                for weight, update in zip(weights, chosen, strict=True):
                    weight.copy_(weight.to(update.dtype) * (1 - lr * decay) - lr * update)
            else:
                if decay:
                    torch._foreach_mul_(weights, 1 - lr * decay)
                torch._foreach_add_(weights, chosen, alpha=-lr)
            if observer is not None:
                self._observe(observer, members, torch._foreach_mul(chosen, lr))


def _named(params: Any, group: Mapping[str, Any]) -> tuple[list[str], list[Tensor]]:
    """Names, none where there are none, and parameters of a group; ValueError for anything but lists of either."""
    if isinstance(params, set | frozenset):
        raise ValueError("'params' is a set, whose order differs between ranks and runs; give a list")
    params = [params] if isinstance(params, Tensor) else list(params)
    pairs = [each for each in params if isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str)]
    if pairs and len(pairs) < len(params):
        stray = next(type(each).__name__ for each in params if not isinstance(each, tuple))
        raise ValueError(
            f"'params' mixes (name, parameter) pairs, the first of them {pairs[0][0]!r}, with a {stray} without a "
            "name; give pairs, or parameters"
        )
    names = [name for name, _ in pairs] or list(group.get("names") or group.get("param_names") or ())
    params = [parameter for _, parameter in pairs] or params
    if not all(isinstance(parameter, Tensor) for parameter in params):
        raise ValueError("'params' must be parameters, or (name, parameter) pairs")
    return names, params


def _warn_of_narrow_weights(members: list[ParamSpec]) -> None:
    narrow = [
        member
        for member in members
        if member.parameter.requires_grad and member.parameter.dtype in (torch.bfloat16, torch.float16)
    ]
    if not narrow:
        return
    kind = str(narrow[0].parameter.dtype).removeprefix("torch.")
    warnings.warn(
        f"{len(narrow)} weights, the first of them {narrow[0].name}, are {kind} and have no master copy: at usual "
        "rates four in five of their elements never move, for an update is below half the distance to the next number. "
        "Keep them in float32 and compute in bfloat16: FSDP2's MixedPrecisionPolicy(param_dtype=torch.bfloat16), "
        "torch.autocast, or an engine with masters, as DeepSpeed and Megatron have",
        stacklevel=3,
    )


def _group(option: str, ranks: Any) -> Group | None:
    try:
        return None if ranks is None else group_from(ranks)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None
