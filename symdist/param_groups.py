"""Parameter groups: checks of the user's input, default options, and descriptions of the parameters."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import ExchangeOptions, Plan, Stack, StageSlot, make_plan
from symdist.layouts import FlatLayout, Group, Layout, layout_of, local
from symdist.matrix_views import bind_view
from symdist.routing.residual_stream import ResidualStage, residual_stage
from symdist.rules import Rule, get_rule, rule_names
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
_READERS = {"params", "param_names", "lr", "rule"}
# Keys that trainers and PyTorch's schedulers store in param groups. They are accepted and kept, but not used here.
_BOOKKEEPING = frozenset(
    (
        *("name", "group_name", "initial_lr", "swa_lr", "base_lr", "max_lr", "min_lr", "pre_lr"),
        *("lr_mult", "wd_mult", "lr_multiplier", "wd_multiplier", "lr_scale", "wd_scale", "start_wd", "end_wd"),
        *("base_momentum", "max_momentum", "initial_momentum", "default_config", "is_expert_parallel"),
    )
)


class ParamGroup(TypedDict, total=False):
    """The keys of a param group. The options of its rule are further keys.

    Attributes:
        params: The parameters, or `(name, parameter)` pairs. Required.
        param_names: The names of the parameters, if `params` are not pairs; "param_0" and so on by default.
        rule: The name of the rule, one of `symdist.rule_names()`. Required here or as an optimizer default.
        lr: The learning rate, 0 or more; may change between steps. Required here or as an optimizer default.
        weight_decay: The decoupled weight decay: a step subtracts `lr · weight_decay` times the weight. 0 by default.
        cautious_weight_decay: Whether to decay only the weights that their update does not move away from zero. False
            by default.
        view: How the stored tensor is read as matrices, see `symdist.matrix_views.bind_view`. "as_stored" by default.
        strategy: Where the rule runs: "local", "reduce", "owner", or "auto" (default) for the cheapest of these.
        skip_zero_grad_rows: Whether to leave a row unchanged, without decay, if its gradient is exactly zero, as for a
            token that did not occur. False by default.
        padding_rows: The number of last rows that are padding. They are left out of the rule's computations and never
            change. 0 by default.
        role: What the parameters are used for, such as "embedding"; for reports and schedules. Empty by default.
        layouts: For each parameter, its layout, or None to read the layout from the tensor. None by default.
    """

    params: Any
    param_names: Sequence[str]
    rule: str
    lr: float | Tensor
    weight_decay: float
    cautious_weight_decay: bool
    view: Any
    strategy: Literal["auto", "local", "reduce", "owner"]
    skip_zero_grad_rows: bool
    padding_rows: int
    role: str
    layouts: Sequence[Layout | FlatLayout | None] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ParamSpec:
    """A parameter as the optimizer describes it.

    Attributes:
        parameter: The parameter: a plain tensor or a DTensor.
        name: The parameter's name.
        group: The index of its param group.
        rule: Its rule.
        layout: How it is sharded.
        found_as: Its dtype, device and shape at the time of the description. These can change while the parameter
            remains the same object.
        dtype: The dtype of its state and of all arithmetic: float32, or the parameter's dtype if that is wider.
        stack: The properties that parameters must share to run together. None if PyTorch's AdamW can step the local
            piece.
        stage: Its stage of the residual stream, if its rule couples the matrices of a stage; otherwise None (the
            default).
        holds: Whether it may store part of the tensor that its stage shares; False by default.
    """

    parameter: Tensor
    name: str
    group: int
    rule: Rule
    layout: Layout | FlatLayout
    found_as: tuple[object, ...]
    dtype: torch.dtype
    stack: Stack | None
    stage: ResidualStage | None = None
    holds: bool = False


def defaults_for(groups: Iterable[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's `defaults`: the defaults common to all groups, overridden by the optimizer's keywords.

    Args:
        groups: The param groups as the user passed them.
        given: The optimizer's keywords. Each applies to the groups whose rule has that option.

    Returns:
        The defaults.

    Raises:
        TypeError: If there is a keyword that the rule of no group has.
    """
    rules = {group.get("rule", given.get("rule")) for group in groups}
    if not rules <= set(rule_names()):
        # A missing or misspelt rule knows no keyword. `read_group` names that fault, which is the one to mend.
        return {**COMMON, **given}
    known = {*COMMON, *_READERS}.union(*(_own_options(get_rule(name)) for name in rules))
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise TypeError(
                f"SymDist() got an unexpected keyword argument {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(sorted(known))}")
            )
    return {**COMMON, **given}


def read_group(
    given: Mapping[str, Any],
    *,
    index: int,
    defaults: Mapping[str, Any],
    known: Sequence[ParamSpec],
    replicas: Group | None,
) -> tuple[dict[str, Any], list[ParamSpec]]:
    """Complete a param group with defaults, check it, and describe its parameters.

    Args:
        given: The group as the user passed it; not modified.
        index: The index of the group among the optimizer's groups.
        defaults: The optimizer's defaults. The group takes those that its rule has.
        known: The parameters of earlier groups.
        replicas: The ranks that hold identical plain tensors; None if not known.

    Returns:
        The completed group, and the descriptions of its parameters in order.

    Raises:
        ValueError: Naming the group or parameter, with a remedy where there is one, if the group is not valid or a
            parameter cannot be optimized.
    """
    group = dict(given)
    if "params" not in group:
        raise ValueError(f"a param group needs 'params'; this one has {', '.join(map(repr, group))}")
    names, params = named_params(group["params"], group)
    names = names or [f"param_{len(known) + i}" for i in range(len(params))]
    if len(names) != len(params):
        raise ValueError(f"a param group has {len(params)} params but {len(names)} names")
    if not params:
        raise ValueError(f"param group {group.get('role', '')!r} has no parameters")
    layouts = list(group.pop("layouts", None) or [None] * len(params))
    if len(layouts) != len(params):
        raise ValueError(f"a param group has {len(params)} params but {len(layouts)} layouts")
    rule = group.get("rule", defaults.get("rule"))
    taken = {*COMMON, *_READERS, *(_own_options(get_rule(rule)) if rule in rule_names() else ())}
    group = {key: value for key, value in defaults.items() if key in taken} | group
    group = with_defaults(group | {"params": params, "param_names": names})
    by_id = {id(spec.parameter): spec.name for spec in known}
    specs = []
    for name, parameter, layout in zip(names, params, layouts, strict=True):
        if id(parameter) in by_id:
            raise ValueError(f"{name} is given twice: it is {by_id[id(parameter)]} of another place or group")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; materialise it (to_empty) before building the optimizer")
        by_id[id(parameter)] = name
        specs.append(describe_param(parameter, name=name, index=index, group=group, replicas=replicas, layout=layout))
    return group, specs


def _own_options(rule: Rule) -> dict[str, Any]:
    """Return the defaults of a rule's own options and of its accumulator's options."""
    return {**ACCUMULATOR_OPTIONS[rule.accumulator], **rule.defaults}


def with_defaults(group: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in every common option and every option of the rule, and check the group.

    Args:
        group: A group with "param_names"; not modified.

    Returns:
        The completed group.

    Raises:
        ValueError: Naming the group, if the rule is missing or unknown, an option is unknown, or a value is missing or
            out of range.
    """
    where = f"param group {group['role']!r}" if group.get("role") else f"param group of {group['param_names'][0]}"
    if "rule" not in group:
        raise ValueError(
            f"{where} has no 'rule'; give one, as in rule='muon', or build the optimizer by a recipe, with "
            "symdist.build_optimizer(model, recipe)"
        )
    try:
        rule = get_rule(group["rule"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    own = _own_options(rule)
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


def describe_param(
    parameter: Tensor,
    *,
    name: str,
    index: int,
    group: Mapping[str, Any],
    replicas: Group | None = None,
    layout: Layout | FlatLayout | None = None,
) -> ParamSpec:
    """Determine a parameter's layout, view, stack and residual stage.

    Args:
        parameter: The parameter.
        name: The parameter's name.
        index: The index of its param group.
        group: The group, completed by `with_defaults`.
        replicas: The ranks that hold identical plain tensors; None (default) if not known.
        layout: How the parameter is sharded; None (default) to read that from the tensor.

    Returns:
        The description.

    Raises:
        ValueError: Naming the parameter, if it is not floating-point, if several of its elements share memory, or if
            its rule, view or layout does not fit its shape.
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
    # A view is checked even if nothing uses it. The default view is not, because a tensor of any shape may have it.
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
        # Experts store none of the shared columns. Under expert parallelism, ranks hold different experts, and what is
        # stored where must not depend on how the experts are distributed.
        holds=stage is not None and len(layout.shape) == 2 and not str(group["role"]).startswith("expert"),
    )


def _check_memory(name: str, parameter: Tensor) -> None:
    """Raise ValueError if several elements share one number in memory, as in expanded tensors.

    Such a tensor cannot be stepped.
    """
    here = local(parameter)
    if any(stride == 0 and size > 1 for stride, size in zip(here.stride(), here.shape, strict=True)):
        raise ValueError(
            f"{name} is expanded: it has shape {tuple(here.shape)} and strides {here.stride()}, so several of its "
            "elements are one number in memory; make the parameter of what was expanded, and expand it in forward"
        )


def _view_of_interleaved(view: Any, layout: Layout, *, name: str, padding: int, ordered: bool) -> Any:
    """Translate a view of a tensor in its own order to a view of the tensor as it is stored, interleaved over ranks.

    Most views remain the same, because most rules do not depend on the order of rows or columns; `ordered` rules do.

    Raises:
        ValueError: Naming the parameter, if the view does not work on the interleaved order.
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
    """Return whether the rule of a group treats every element independently of all others.

    Args:
        options: The group, completed by `with_defaults`.

    Returns:
        False if the rule needs matrices or an option of the group applies to whole rows, otherwise True.
    """
    rows = options.get("centered") or options["skip_zero_grad_rows"] or options["padding_rows"] > 0
    return not (get_rule(options["rule"]).matrices or rows)


def flat_parts(
    name: str, shape: tuple[int, ...], options: Mapping[str, Any], *, bounds: tuple[int, ...], ranks: Group
) -> list[tuple[str, FlatLayout, int]]:
    """Split a parameter that is cut into ranges of elements into the parts that the optimizer takes as parameters.

    A stack of matrices becomes one part per matrix. If the rule treats every element independently, a parameter of any
    shape becomes one vector.

    Args:
        name: The parameter's name.
        shape: The shape of the whole parameter.
        options: The options of its group, completed by `with_defaults`.
        bounds: The offsets at which the ranges of the ranks meet, from 0 to the number of elements: one more than there
            are ranks.
        ranks: The ranks, in the order of their ranges.

    Returns:
        For each part: its name, its layout, and the offset within this rank's range at which this rank's piece of the
        part starts.

    Raises:
        ValueError: If the parameter has no elements.
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


def plan_params(members: Sequence[ParamSpec], *, exchange: ExchangeOptions) -> Plan:
    """Plan a step: group the parameters into stacks and choose where each stack runs.

    Parameters without a stack and frozen parameters are not part of the plan.

    Args:
        members: All parameters of the optimizer.
        exchange: The settings of the communication.

    Returns:
        The plan.

    Raises:
        ValueError: Naming a parameter, if its layout does not allow its strategy, or its residual stage cannot be
            shared.
    """
    stacks: dict[Stack, list[int]] = {}
    for i, member in enumerate(members):
        if member.stack is not None and member.parameter.requires_grad:
            stacks.setdefault(member.stack, []).append(i)
    names = [member.name for member in members]
    stages = _in_stages(members)
    return make_plan(stacks, names=names, exchange=exchange, stages=stages)


def _in_stages(members: Sequence[ParamSpec]) -> dict[int, StageSlot]:
    """Assign the shared columns of every residual stage to its matrices.

    Returns:
        For every coupled parameter, by index, its stage and which of the stage's shared columns it stores.
    """
    by_stage: dict[ResidualStage, list[int]] = {}
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
    # Error messages name only one parameter per width and per set of ranks, as there may be hundreds of experts.
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
    """Check that no other rank can hold more matrices of the residual stages in a plan.

    Args:
        plan: The plan of a step.
        peers: The ranks that train this model; None if this rank trains alone.

    Raises:
        ValueError: If other ranks may hold more matrices of these stages.
    """
    home = next((job.stack.layout.group for job in plan.jobs if job.stages), None)
    coupled = any(job.stages for job in plan.jobs)
    if coupled and peers is not None and peers.size > 1 and (home is None or set(home.ranks) != set(peers.ranks)):
        raise ValueError(
            f"share = 'residual_stage': ranks {peers.ranks} train this model, and the matrices here lie on "
            f"{home.ranks if home is not None else 'this one alone'}: others may hold more of their stages, as under "
            "pipelines; use share = 'matrix'. Of plain tensors that are the same on all ranks say so by "
            "replicate_group="
        )


def named_params(params: Any, group: Mapping[str, Any]) -> tuple[list[str], list[Tensor]]:
    """Read the names and parameters of a group.

    Args:
        params: A tensor, several parameters, or `(name, parameter)` pairs.
        group: The group. Its "param_names" are used if `params` are not pairs.

    Returns:
        The names, which are empty if none are given, and the parameters.

    Raises:
        ValueError: If `params` is a set, mixes pairs with parameters, or contains anything that is not a tensor.
    """
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
    names = [name for name, _ in pairs] or list(group.get("param_names") or ())
    params = [parameter for _, parameter in pairs] or params
    if not all(isinstance(parameter, Tensor) for parameter in params):
        raise ValueError("'params' must be parameters, or (name, parameter) pairs")
    return names, params


def warn_of_narrow_weights(specs: Iterable[ParamSpec]) -> None:
    """Warn if trainable weights are bfloat16 or float16, which are too coarse for updates at usual learning rates.

    Args:
        specs: The optimizer's parameters.
    """
    narrow = [
        spec
        for spec in specs
        if spec.parameter.requires_grad and spec.parameter.dtype in (torch.bfloat16, torch.float16)
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
