"""SymDist: every parameter under its own symmetry-compatible rule, on the shards where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symdist.accumulate import adamw_step, advance, inward
from symdist.exchange import (
    Collectives,
    Counting,
    FlatJob,
    Given,
    Job,
    Made,
    Placement,
    Plan,
    Task,
    Trail,
    Transport,
    rehearse,
    run,
)
from symdist.finite import NonFinite, agree_finite, ranks_that_agree
from symdist.groups import Member, check_stages, complete_group, describe_member, gradient_of, place_members
from symdist.layouts import Group, group_from, local
from symdist.partial import finish_partial_gradients
from symdist.routed import Routed, routed
from symdist.saved import check_groups, check_state

if TYPE_CHECKING:
    from symdist.diagnostics.steps import StepMonitor

WAVE_BYTES = 1 << 30


class SymDist(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over groups that each name a rule.

    A group is a dict: `params` (parameters, or `(name, parameter)` pairs), `rule`, `lr`, `weight_decay`,
    `cautious_decay` (decay only those weights that their update takes towards zero, too), `view`,
    `stale_rows`, `placement`, `padding_rows`, the rule's own options, and `role` and `names` for the reader. A 3-D
    parameter is a stack of matrices. `layouts`, where given, has for each parameter None or where it lies; of
    a `FlatLayout` every rank gives its piece, an empty vector where it holds nothing.

    A missing gradient is a zero gradient. State lies like its parameter, is complete from construction on, and is
    float32 or wider. `lr`, the decay and what the momentum is told may change between steps; the rule's own
    options and the view are those of construction.

    `nonfinite` says what all ranks do together when a gradient is inf or NaN on any: "raise" FloatingPointError before
    anything changes, "skip" the step (counted in `skipped_steps`), or "zero" the offending elements. "All ranks" are
    `world`, a process group or mesh; left out, all of the mesh that the parameters' meshes were sliced from, stages
    of a pipeline included. `replicas`, a process group or mesh, says that plain tensors are the same on its ranks, as
    under DDP: work on them is then shared out. `exchange_dtype`, bfloat16 say, is what matrices travel as to their
    owners and back; sums and Grams travel as they are. `wave_bytes` bounds the buffers in flight. `transport` replaces
    the collectives, to count them. A parameter that does not require a gradient does not move.

    Raises ValueError, naming group or parameter and the remedy, for anything it cannot run exactly as asked.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        nonfinite: NonFinite = "raise",
        wave_bytes: int = WAVE_BYTES,
        exchange_dtype: torch.dtype | None = None,
        world: Any = None,
        replicas: Any = None,
        transport: Transport | None = None,
    ):
        if nonfinite not in ("raise", "skip", "zero"):
            raise ValueError(f"nonfinite={nonfinite!r} is not 'raise', 'skip' or 'zero'")
        if wave_bytes <= 0:
            raise ValueError(f"wave_bytes={wave_bytes} must be positive")
        if exchange_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"exchange_dtype={exchange_dtype} must be torch.bfloat16, torch.float32, or None for the dtype of "
                "the state; float16 would lose small gradients"
            )
        self.nonfinite: NonFinite = nonfinite
        self.wave_bytes = wave_bytes
        self.exchange_dtype = exchange_dtype
        self._world = _group("world", world)
        self._replicas = _group("replicas", replicas)
        self.transport: Transport = transport or Collectives()
        self.skipped_steps = 0
        self.observer: StepMonitor | None = None
        """What measures the next step, and that one only."""
        self._trail = Trail()
        self._skip_next = False
        self._members: list[Member] = []
        self._planned: tuple[list[bool], Plan] | None = None
        self._peers: Group | None = None
        groups = list(params)
        if not all(isinstance(group, Mapping) for group in groups):
            raise ValueError("SymDist takes param groups, dicts with a 'rule'; symdist.route(model, recipe) makes them")
        self._constructed = False
        super().__init__(groups, {})
        self.plan()
        self._constructed = True
        # Schedulers that cycle momentum look for it here, and write it to every group.
        for key in ("momentum", "betas"):
            if all(key in group for group in self.param_groups):
                self.defaults[key] = self.param_groups[0][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after construction; nothing is added where it raises ValueError."""
        group = dict(param_group)
        if "params" not in group:
            raise ValueError(f"a param group needs 'params'; this one has {', '.join(map(repr, group))}")
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if params and isinstance(params[0], tuple):
            group["names"], params = [name for name, _ in params], [parameter for _, parameter in params]
        if not all(isinstance(parameter, Tensor) for parameter in params):
            raise ValueError("'params' must be parameters, or (name, parameter) pairs")
        first = len(self._members)
        names = list(group.get("names") or (f"param_{first + i}" for i in range(len(params))))
        if len(names) != len(params):
            raise ValueError(f"a param group has {len(params)} params but {len(names)} names")
        if not params:
            raise ValueError(f"param group {group.get('role', '')!r} has no parameters")
        layouts = list(group.pop("layouts", None) or [None] * len(params))
        if len(layouts) != len(params):
            raise ValueError(f"a param group has {len(params)} params but {len(layouts)} layouts")
        group |= {"params": params, "names": names}
        group = complete_group(group)
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
            place_members(self._members + members, wave_bytes=self.wave_bytes)
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
        self._check_options()
        observer, self.observer = self.observer, None
        if self._skip_next:
            self._skip_next = False
            self.skipped_steps += 1
            return loss
        plan = self.plan()
        timing = nullcontext if observer is None else observer.timing
        moving = [member for member in self._members if member.parameter.requires_grad]
        self._trail.before = "summing gradients that ranks hold parts of"
        finish_partial_gradients([member.parameter for member in moving], transport=self.transport)
        gradients = [gradient_of(member) for member in self._members]
        names = [member.name for member in self._members]
        self._trail.before = "agreeing on whether gradients are finite"
        finite = agree_finite(gradients, names, self._peers, transport=self.transport, on_failure=self.nonfinite)
        self._trail.before = ""
        if not finite:
            self.skipped_steps += 1
            return loss

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

    def skip_next(self, skip: bool = True) -> None:
        """Leave the next step out, gradients and all, as one that is not finite; or not, after all. All ranks call it.

        It is counted in `skipped_steps`. Meant for a loss that jumps: what drives the step, be it an engine, goes on
        as ever.
        """
        self._skip_next = skip

    def where(self) -> str:
        """Where a step that another thread runs is: its wave, the collective it waits for; empty between steps."""
        return self._trail.where()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: process groups do not copy."""
        raise TypeError("SymDist cannot be copied or pickled; build another and load_state_dict into it")

    def placements(self) -> dict[str, Placement]:
        """Where each parameter's rule runs, by name."""
        where = self.plan().placements()
        return {member.name: where.get(i, "local") for i, member in enumerate(self._members)}

    def routing(self) -> list[Routed]:
        """What became of every parameter, in the order of the groups."""
        where = self.plan().placements()
        return [
            routed(member, self.param_groups[member.group], where.get(i, "local"))
            for i, member in enumerate(self._members)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; every tensor keeps the dtype and device it has here.

        Raises ValueError, before anything changes, where groups, rules or state do not match.
        """
        saved = state_dict["param_groups"]
        check_groups(self.param_groups, saved)
        states = [state_dict["state"].get(index, {}) for group in saved for index in group["params"]]
        for member, theirs in zip(self._members, states, strict=True):
            # `set_state_dict` leaves out what is frozen here: that keeps the state it has.
            if theirs or member.parameter.requires_grad:
                check_state(member.name, self.state[member.parameter], theirs)
        own = {member.parameter: self.state[member.parameter] for member in self._members}
        names = [group["names"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mine in zip(self.param_groups, names, strict=True):
            # The saved ones may be those of a pipeline stage.
            group["names"] = mine
        for (parameter, mine), theirs in zip(own.items(), states, strict=True):
            for key, tensor in mine.items() if theirs else ():
                # The base class casts state to the parameter's dtype, and leaves `step` on the saved device.
                local(tensor).copy_(local(theirs[key]))
            self.state[parameter] = mine
        self._planned = None

    def plan(self) -> Plan:
        """Where everything runs, and in which waves: the same on all ranks that share parameters."""
        moving = [member.parameter.requires_grad for member in self._members]
        if self._planned is None or self._planned[0] != moving:
            plan = place_members(self._members, wave_bytes=self.wave_bytes, exchange_dtype=self.exchange_dtype)
            parameters = [member.parameter for member in self._members]
            self._peers = self._world or ranks_that_agree(parameters, replicas=self._replicas)
            check_stages(plan, self._peers)
            self.transport.prepare(plan.groups() | ({self._peers} if self._peers is not None else set()))
            self._planned = moving, plan
        return self._planned[1]

    def rehearse(self) -> Counting:
        """Every collective of a step on this rank, in order: the step runs on meta tensors, and nothing moves.

        That is for gradients which are nowhere left in parts; summing such takes further collectives.
        """
        plan, counting = self.plan(), Counting()
        if self._peers is not None and self._peers.size > 1:
            counting.all_reduce(torch.empty(1, device="meta"), group=self._peers)
        rehearse(plan, counting)
        return counting

    def _check_options(self) -> None:
        """ValueError for a rule's option that was changed after construction: it would be ignored."""
        stacks = {member.group: member.stack for member in self._members if member.stack is not None}
        for i, stack in stacks.items():
            group = self.param_groups[i]
            fixed = {**dict(stack.options), "padding_rows": stack.padding_rows}
            fixed["stale_rows"] = "hold" if stack.hold else "move"
            changed = [key for key, value in fixed.items() if group[key] != value]
            if changed:
                raise ValueError(
                    f"param group {group['role'] or group['names'][0]!r}: {', '.join(changed)} changed after "
                    "construction; build another optimizer and load_state_dict into it"
                )

    def _new_state(self, member: Member) -> dict[str, Tensor]:
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

    def _begin(self, job: Job | FlatJob, gradients: list[Tensor]) -> Given:
        directions: dict[int, Tensor] = {}
        for group, members in self._by_group(job.members):
            states = [self._local_state(i) for i in members]
            given = [gradients[i].to(job.stack.dtype) for i in members]
            directions.update(zip(members, advance(job.stack.rule.accumulator, states, given, group), strict=True))
        remembered = [self._local_state(i) for i in job.members] if job.stack.state_names else []
        return Given(
            directions=[directions[i] for i in job.members],
            gradients=[gradients[i] for i in job.members] if job.stack.hold else None,
            states=tuple([state[name] for state in remembered] for name in job.stack.state_names),
        )

    def _local_state(self, index: int) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self.state[self._members[index].parameter].items()}

    def _step_plain(self, gradients: list[Tensor], observer: StepMonitor | None) -> None:
        plain = [i for i, m in enumerate(self._members) if m.stack is None and m.parameter.requires_grad]
        for group, members in self._by_group(plain):
            weights = [local(self._members[i].parameter) for i in members]
            wide = [weight.to(self._members[i].dtype) for i, weight in zip(members, weights, strict=True)]
            lr, decay, cautious = float(group["lr"]), group["weight_decay"], group["cautious_decay"]
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

    def _move(self, job: Job | FlatJob, observer: StepMonitor | None, made: Made) -> None:
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
            if moved is not None or (decay and group["cautious_decay"]):
                for weight, update, place in zip(weights, chosen, places, strict=True):
                    kept: Tensor | float = 1.0 if moved is None else moved[place]
                    if group["cautious_decay"]:
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


def _group(option: str, ranks: Any) -> Group | None:
    try:
        return None if ranks is None else group_from(ranks)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None
