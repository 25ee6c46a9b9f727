"""Parameter groups: what a user may say of one, completed and checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import Plan, Stack, StageSlot, make_plan
from symdist.layouts import FlatLayout, Group, Layout, layout_of, local
from symdist.matrix_views import bind_view
from symdist.routing.residual_stream import Stage, residual_stage
from symdist.rules import Rule, get_rule
from symdist.rules.registry import ACCUMULATOR_OPTIONS

COMMON: dict[str, Any] = {
    "weight_decay": 0.0,
    "cautious_weight_decay": False,
    "view": "as_stored",
    "skip_zero_grad_rows": False,
    "strategy": "auto",
    "padding_rows": 0,
    "role": "",
}
_READERS = {"params", "names", "lr", "rule"}
# What trainers and PyTorch's schedulers keep in groups; carried, and no rule's business.
_BOOKKEEPING = frozenset(
    (
        *("param_names", "name", "group_name", "initial_lr", "swa_lr", "base_lr", "max_lr", "min_lr", "pre_lr"),
        *("lr_mult", "wd_mult", "lr_multiplier", "wd_multiplier", "lr_scale", "wd_scale", "start_wd", "end_wd"),
        *("base_momentum", "max_momentum", "initial_momentum", "default_config", "is_expert_parallel"),
    )
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ParamSpec:
    """A parameter as the optimizer sees it: `stack` is None where PyTorch's AdamW can step it as it lies."""

    parameter: Tensor
    name: str
    group: int
    rule: Rule
    layout: Layout | FlatLayout
    found_as: tuple[object, ...]
    """What may change of the parameter without a new one: dtype, device and shape."""
    dtype: torch.dtype
    """The dtype of its state and of all arithmetic: float32, or wider where the parameter is."""
    stack: Stack | None
    stage: Stage | None = None
    """Of the residual stream, where its rule couples the matrices of one."""
    holds: bool = False
    """Whether it may keep some of what its stage shares."""


def with_defaults(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with every option of its rule filled in.

    Raises ValueError, naming the group, for a missing or unknown rule, an unknown option or a value out of range.
    """
    where = f"param group {group['role']!r}" if group.get("role") else f"param group of {group['names'][0]}"
    if "rule" not in group:
        raise ValueError(f"{where} has no 'rule'; give one, or build the groups with symdist.route(model, recipe)")
    try:
        rule = get_rule(group["rule"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    own = {**ACCUMULATOR_OPTIONS[rule.accumulator], **rule.defaults}
    unknown = sorted(
        key for key in set(group) - set(own) - set(COMMON) - _READERS - _BOOKKEEPING if not key.startswith("_")
    )
    if unknown:
        raise ValueError(
            f"{where}: rule {rule.name!r} knows no option {', '.join(map(repr, unknown))}; "
            f"it knows {', '.join(sorted({*own, *COMMON, 'lr'}))}. A trainer's own value may be kept under a name that "
            "begins with '_'"
        )
    completed = {**COMMON, **rule.options({k: group[k] for k in own if k in group}, where=where), **group}
    _check_common(completed, where)
    return completed


def _check_common(group: Mapping[str, Any], where: str) -> None:
    lr = group.get("lr")
    if lr is None:
        raise ValueError(f"{where} has no 'lr'; learning rates of different rules have no common default")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr is a tensor of shape {tuple(lr.shape)}; a learning rate is one number")
    if isinstance(lr, bool | str) or not (math.isfinite(float(lr)) and float(lr) >= 0):
        raise ValueError(f"{where}: lr={lr!r} must be a finite number, 0 or more")
    decay = group["weight_decay"]
    if not (isinstance(decay, int | float) and math.isfinite(decay) and decay >= 0):
        raise ValueError(f"{where}: weight_decay={decay!r} must be a finite number, 0 or more")
    for key in ("cautious_weight_decay", "skip_zero_grad_rows"):
        if not isinstance(group[key], bool):
            raise ValueError(f"{where}: {key}={group[key]!r} must be true or false")
    if not isinstance(group["padding_rows"], int) or group["padding_rows"] < 0:
        raise ValueError(f"{where}: padding_rows={group['padding_rows']!r} must be a whole number, 0 or more")
    if group["strategy"] not in ("auto", "local", "reduce", "owner"):
        raise ValueError(f"{where}: strategy={group['strategy']!r} is not 'auto', 'local', 'reduce' or 'owner'")


def describe_member(
    parameter: Tensor,
    *,
    name: str,
    index: int,
    group: Mapping[str, Any],
    replicas: Group | None = None,
    layout: Layout | FlatLayout | None = None,
) -> ParamSpec:
    """Find a parameter's layout, view and stack; `replicas` are the ranks that hold plain tensors alike.

    `layout` says where the parameter lies, for those that do not tell by themselves.

    Raises ValueError, naming it, where the rule, the view or the layout do not fit its shape.
    """
    rule = get_rule(group["rule"])
    if not parameter.is_floating_point():
        raise ValueError(f"{name} is {parameter.dtype}; only floating-point parameters can be optimized")
    layout = layout if layout is not None else layout_of(parameter, name=name, replicas=replicas)
    if not isinstance(parameter, DTensor) and tuple(parameter.shape) != layout.local_shape:
        raise ValueError(
            f"{name}: this rank's piece has shape {tuple(parameter.shape)}, its layout {layout.local_shape}"
        )
    _check_memory(name, parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if rule.matrices and len(layout.shape) < 2:
        raise ValueError(f"{name} has shape {layout.shape}: rule {rule.name!r} needs a matrix; use rule 'adamw'")
    if rule.matrices and 0 in layout.shape:
        raise ValueError(f"{name} has shape {layout.shape} and so no matrix in it; leave it out of the optimizer")
    padding, skip = group["padding_rows"], group["skip_zero_grad_rows"]
    if padding and (
        group["view"] not in ("as_stored", "transposed") or len(layout.shape) != 2 or padding >= layout.shape[0]
    ):
        raise ValueError(
            f"{name}: padding_rows={padding} needs a matrix seen as stored or transposed, with more rows than that; "
            f"its shape is {layout.shape}, its view {group['view']!r}"
        )
    plain = not rule.matrices and not group["centered"] and not padding and not skip
    stacked = not plain or group["strategy"] in ("reduce", "owner")
    stack = None
    # A view that nothing will look through is still checked; the default is left to tensors of any shape.
    if stacked or group["view"] != COMMON["view"]:
        seen = group["view"]
        if isinstance(layout, Layout) and layout.interleaved:
            seen = _view_of_interleaved(seen, layout, name=name, padding=padding, ordered=rule.ordered)
        view = bind_view(seen, layout.shape, name=name)
        if rule.ordered and view.kind.startswith("gate_up"):
            raise ValueError(
                f"{name}: rule {rule.name!r} goes by the places of columns, which view {group['view']!r} mixes; "
                "use 'as_stored', 'transposed' or, in a recipe, 'residual'"
            )
    if stacked:
        stack = Stack(
            rule=rule,
            options=tuple(sorted(rule.update_options(group).items())),
            view=view,
            layout=layout,
            dtype=dtype,
            device=parameter.device,
            asked=group["strategy"],
            skip_zero_grad_rows=skip,
            padding_rows=padding,
        )
    stage = residual_stage(name, str(group.get("role", ""))) if stack is not None and stack.coupled else None
    return ParamSpec(
        parameter=parameter,
        name=name,
        group=index,
        rule=rule,
        layout=layout,
        found_as=(parameter.dtype, parameter.device, parameter.shape),
        dtype=dtype,
        stack=stack,
        stage=stage,
        # Under expert parallelism ranks have others of them, and what is kept must not hang on that.
        holds=stage is not None and len(layout.shape) == 2 and not str(group["role"]).startswith("expert"),
    )


def _check_memory(name: str, parameter: Tensor) -> None:
    """ValueError for a weight of which several elements are one number in memory: it has no one value to step to."""
    here = local(parameter)
    if any(stride == 0 and size > 1 for stride, size in zip(here.stride(), here.shape, strict=True)):
        raise ValueError(
            f"{name} is expanded: it has shape {tuple(here.shape)} and strides {here.stride()}, so several of its "
            "elements are one number in memory; make the parameter of what was expanded, and expand it in forward"
        )


def _view_of_interleaved(view: Any, layout: Layout, *, name: str, padding: int, ordered: bool) -> Any:
    """The view that shows of a tensor as it is stored what `view` shows of it in its own order.

    Rows, and columns, may stand in any order: no rule minds, but for those that go by places. Raises ValueError,
    naming the parameter, for a view that the order mixes.
    """
    for each in layout.interleaved:
        side = each.dim - (len(layout.shape) - 2)
        fused = {"gate_up": 1, "dim": side} if side in (0, 1) else None
        if each.parts == 2 and (view == fused or (view == "gate_up_stacked" and side == 0)):
            view = {"gate_up": each.ranks, "dim": side}
            continue
        across = isinstance(view, Mapping) and view.get("dim") == 1 - side
        if side < 0 or ((view in ("as_stored", "transposed") or across) and not padding and not ordered):
            continue
        raise ValueError(
            f"{name}: dimension {each.dim} is dealt out to {each.ranks} ranks, {each.parts} parts one after the other "
            f"on each, and view {view!r}{', with padding rows,' if padding else ''} needs its own order; use view "
            "'as_stored' or 'transposed' and a rule that goes by no places, or shard it plainly"
        )
    return view


def coordinate_wise(options: Mapping[str, Any]) -> bool:
    """Whether a rule, by the options of `with_defaults`, treats every number by itself, whatever the others are."""
    rows = options.get("centered") or options["skip_zero_grad_rows"] or options["padding_rows"] > 0
    return not (get_rule(options["rule"]).matrices or rows)


def flat_parts(
    name: str, shape: tuple[int, ...], options: Mapping[str, Any], *, bounds: tuple[int, ...], ranks: Group
) -> list[tuple[str, FlatLayout, int]]:
    """A parameter that is cut in runs of elements, as what the optimizer takes of it: names, layouts, starts.

    `options` are those of `with_defaults`, `bounds` the offsets at which the runs of `ranks` meet. A stack of matrices
    is taken one by one, and what a rule does to each element by itself as one vector. A start is where this rank's
    piece begins in its run.
    """
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape} and so nothing in it; leave it out of the optimizer")
    count = math.prod(shape[:-2]) if len(shape) > 2 else 1
    shapes: list[tuple[int, ...]] = [shape]
    names = [name]
    if coordinate_wise(options):
        shapes = [(bounds[-1],)]
    elif len(shape) > 2:
        shapes, names = [shape[-2:]] * count, [f"{name}[{i}]" for i in range(count)]
    size = bounds[-1] // len(shapes)
    first = bounds[ranks.index]
    found = []
    for i, (each, its_name) in enumerate(zip(shapes, names, strict=True)):
        within = tuple(min(max(bound - i * size, 0), size) for bound in bounds)
        found.append((its_name, FlatLayout(shape=each, group=ranks, bounds=within), max(i * size - first, 0)))
    return found


def plan_step(
    members: Sequence[ParamSpec], *, bucket_bytes: int, communication_dtype: torch.dtype | None = None
) -> Plan:
    """The plan of a step: the members that share a stack put together, and each stack placed.

    Members without a stack, and frozen ones, are in no job. Raises ValueError, naming a parameter, where its strategy
    does not fit.
    """
    stacks: dict[Stack, list[int]] = {}
    for i, member in enumerate(members):
        if member.stack is not None and member.parameter.requires_grad:
            stacks.setdefault(member.stack, []).append(i)
    names = [member.name for member in members]
    stages = _in_stages(members)
    return make_plan(
        stacks, names=names, bucket_bytes=bucket_bytes, communication_dtype=communication_dtype, stages=stages
    )


def _in_stages(members: Sequence[ParamSpec]) -> dict[int, StageSlot]:
    """The stage of every coupled member, and which columns it keeps of what that shares: those that come next."""
    by_stage: dict[Stage, list[int]] = {}
    for i, member in enumerate(members):
        if member.stage is not None and member.parameter.requires_grad:
            by_stage.setdefault(member.stage, []).append(i)
    towers = {stage.tower for stage in by_stage if stage.tower is not None}
    if by_stage and len(towers) != 1:
        found = ", ".join(sorted(towers)) or "none"
        raise ValueError(
            f"rotations are shared over the stages of one stack of numbered layers; here are {found}: share = "
            "'matrix' does without"
        )
    last = max((stage.number for stage in by_stage if stage.number is not None), default=0)
    merged: dict[int, list[int]] = {}
    for stage, indices in by_stage.items():
        merged.setdefault(last if stage.number is None else stage.number, []).extend(indices)
    return {i: found for number in sorted(merged) for i, found in _kept(members, sorted(merged[number]), number)}


def _kept(members: Sequence[ParamSpec], indices: Sequence[int], number: int) -> list[tuple[int, StageSlot]]:
    seen = {i: members[i].stack for i in indices}
    # One name for each is told: of experts there may be hundreds.
    rows: dict[int, str] = {}
    homes: dict[tuple[int, ...], str] = {}
    for i, stack in seen.items():
        assert stack is not None
        group = stack.layout.group
        rows.setdefault(stack.rows, members[i].name)
        homes.setdefault(() if group is None else group.ranks, members[i].name)
    if len(rows) > 1:
        told = ", ".join(f"{width} in {name}" for width, name in sorted(rows.items()))
        raise ValueError(f"stage {number} of the residual stream has several widths, {told}")
    if len(homes) > 1:
        told = ", ".join(f"{name} on {ranks or 'this rank alone'}" for ranks, name in sorted(homes.items()))
        raise ValueError(
            f"the matrices of stage {number} of the residual stream lie on different ranks: {told}; share = 'matrix', "
            "for some or for all, does without"
        )
    width, firsts = 0, {}
    (wide,) = rows
    for i in indices:
        stack = seen[i]
        assert stack is not None
        firsts[i] = width if members[i].holds and width < wide else -1
        width += min(stack.columns, wide - width) if firsts[i] >= 0 else 0
    if width == 0:
        raise ValueError(
            f"stage {number} has no matrix but experts, to keep its rotation; one is {members[indices[0]].name}"
        )
    return [(i, StageSlot(label=f"{number:06d}", width=width, first=firsts[i])) for i in indices]


def check_stages(plan: Plan, peers: Group | None) -> None:
    """ValueError where other ranks may hold other matrices of the stages that share rotations here."""
    home = next((job.stack.layout.group for job in plan.jobs if job.stages), None)
    coupled = any(job.stages for job in plan.jobs)
    if coupled and peers is not None and peers.size > 1 and (home is None or set(home.ranks) != set(peers.ranks)):
        raise ValueError(
            f"share = 'residual_stage': ranks {peers.ranks} train this model, and the matrices here lie on "
            f"{home.ranks if home is not None else 'this one alone'}: others may hold more of their stages, as under "
            "pipelines; use share = 'matrix'. Of plain tensors that are the same on all ranks say so by replicas="
        )


def gradient_of(member: ParamSpec) -> Tensor:
    """This rank's gradient of a parameter, zero where it has none or is frozen.

    Raises ValueError, naming the parameter, for one that is sparse, or lies otherwise than the weight.
    """
    gradient = member.parameter.grad
    if gradient is None or not member.parameter.requires_grad:
        return torch.zeros_like(local(member.parameter))
    if gradient.is_sparse:
        raise ValueError(f"{member.name} has a sparse gradient; build its embedding with sparse=False")
    mine, theirs = getattr(member.parameter, "placements", None), getattr(gradient, "placements", None)
    here = local(gradient)
    if mine != theirs or tuple(here.shape) != member.layout.local_shape:
        raise ValueError(
            f"{member.name}: this rank's gradient has shape {tuple(here.shape)} and placements {theirs}, its weight "
            f"{member.layout.local_shape} and {mine}; gradients must be reduced and placed like their weights before "
            "the step"
        )
    return here
