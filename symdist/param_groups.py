"""Param groups: what the user gives, completed by defaults and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from symdist.layouts import FlatLayout, Group, Layout
from symdist.matrix_views import plain_view
from symdist.param_specs import ParamSpec, describe_param, members_of
from symdist.rules import Rule, get_rule, rule_names
from symdist.rules.registry import ACCUMULATOR_OPTIONS

COMMON: dict[str, Any] = {
    "weight_decay": 0.0,
    "cautious_weight_decay": False,
    "view": "as_stored",
    "skip_zero_grad_rows": False,
    "strategy": "auto",
    "padding_rows": 0,
    "weight_rounding": "nearest",
    "rounding_seed": 0,
    "rounding_step": 0,
    "role": "",
}
# The largest learning rate and decay. Their product is below the largest float32, so that no step overflows by them.
_RATE = 1e9
A_RATE = f"must be a finite number, 0 or more and at most {_RATE:g}"
"""What `is_rate` holds a value to, for error messages."""
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
        weight_decay: The decoupled weight decay: a step subtracts `lr · weight_decay` times the weight. A number or a
            tensor of one; may change between steps. 0 by default.
        cautious_weight_decay: Whether to decay only the weights that their update does not move away from zero. False
            by default.
        view: How the stored tensor is read as matrices, see `symdist.matrix_views.bind_view`, and `sections_of` there
            for matrices of several sizes. "as_stored" by default.
        strategy: Where the rule runs: "local", "reduce", "owner", or "auto" (default) for the cheapest of these.
        skip_zero_grad_rows: Whether to leave a row unchanged, without decay, if its gradient is exactly zero, as for a
            token that did not occur. False by default.
        padding_rows: The number of last rows that are padding. They are left out of the rule's computations and never
            change. 0 by default.
        state_dtype: "bfloat16" to keep the momentum in half the memory, rounded stochastically. None (default) for the
            dtype of the arithmetic. Not for the rule "adamw".
        weight_rounding: "stochastic" to round weights that are bfloat16 by chance, so that updates smaller than half
            the distance to the next number are not lost; "nearest" by default. Weights in float32 are not rounded.
        rounding_seed: The seed of stochastic rounding, the same on all ranks. 0 by default.
        rounding_step: How many steps have been rounded; counted by the optimizer, for runs that are resumed.
        role: What the parameters are used for, such as "embedding"; for reports and schedules. Empty by default.
        layouts: For each parameter, its layout, or None to read the layout from the tensor. None by default.
    """

    params: Any
    param_names: Sequence[str]
    rule: str
    lr: float | Tensor
    weight_decay: float | Tensor
    cautious_weight_decay: bool
    view: Any
    strategy: Literal["auto", "local", "reduce", "owner"]
    skip_zero_grad_rows: bool
    padding_rows: int
    state_dtype: Literal["bfloat16"] | None
    weight_rounding: Literal["nearest", "stochastic"]
    rounding_seed: int
    rounding_step: int
    role: str
    layouts: Sequence[Layout | FlatLayout | None] | None


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Return an optimizer's `params` as param groups: its groups, or one of all its parameters.

    Args:
        params: Parameters, `(name, parameter)` pairs, or groups; an iterator is used up.
    """
    # A set is kept, because `named_params` refuses it with the reason.
    items = params if isinstance(params, Tensor | set | frozenset) else list(params)
    if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items):
        return [dict(group) for group in items]
    return [{"params": items}]


def defaults_for(groups: Iterable[Mapping[str, Any]], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's `defaults`: the defaults common to all groups, overridden by the optimizer's keywords.

    Args:
        groups: The param groups as the user passed them.
        keywords: The optimizer's keywords. Each applies to the groups whose rule has that option.

    Returns:
        The defaults.

    Raises:
        TypeError: If there is a keyword that the rule of no group has.
    """
    rules = {group.get("rule", keywords.get("rule")) for group in groups}
    if not rules <= set(rule_names()):
        # A missing or misspelt rule knows no keyword. `read_group` names that fault, which is the one to mend.
        return {**COMMON, **keywords}
    known = {*COMMON, *_READERS}.union(*(_rule_options(get_rule(name)) for name in rules))
    for key in keywords:
        if key not in known:
            matches = difflib.get_close_matches(key, known, n=1)
            raise TypeError(
                f"SymDist() got an unexpected keyword argument {key!r}"
                + (f"; did you mean {matches[0]!r}?" if matches else f"; it knows {', '.join(sorted(known))}")
            )
    return {**COMMON, **keywords}


def read_group(
    param_group: Mapping[str, Any],
    *,
    index: int,
    defaults: Mapping[str, Any],
    known: Sequence[ParamSpec],
    replicas: Group | None,
) -> tuple[dict[str, Any], list[ParamSpec]]:
    """Complete a param group with defaults, check it, and describe its parameters.

    Args:
        param_group: The group as the user passed it; not modified.
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
    group = dict(param_group)
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
    known_options = {*COMMON, *_READERS, *(_rule_options(get_rule(rule)) if rule in rule_names() else ())}
    group = {key: value for key, value in defaults.items() if key in known_options} | group
    group = with_defaults(group | {"params": params, "param_names": names})
    name_by_id = {id(spec.parameter): spec.name for spec in known}
    specs = []
    for name, parameter, layout in zip(names, params, layouts, strict=True):
        if id(parameter) in name_by_id:
            raise ValueError(
                f"{name} is the same tensor as {name_by_id[id(parameter)]}, which is in the optimizer already; give "
                "each parameter once"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; materialize it (to_empty) before building the optimizer")
        name_by_id[id(parameter)] = name
        specs.append(describe_param(parameter, name=name, index=index, group=group, replicas=replicas, layout=layout))
    return group, specs


def _rule_options(rule: Rule) -> dict[str, Any]:
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
    rule_options = _rule_options(rule)
    known = {*rule_options, *COMMON, *_READERS, *_BOOKKEEPING}
    unknown = sorted(key for key in set(group) - known if not key.startswith("_"))
    if unknown:
        raise ValueError(
            f"{where}: rule {rule.name!r} knows no option {', '.join(map(repr, unknown))}; "
            f"it knows {', '.join(sorted({*rule_options, *COMMON, 'lr'}))}. Values of your own may be stored under a "
            "name that begins with '_'"
        )
    completed = {**COMMON, **rule_options, **group}
    completed["view"] = plain_view(completed["view"])
    check_values(completed, where)
    return completed


def check_values(group: Mapping[str, Any], where: str) -> None:
    """Check the values of a completed group, or of one with saved options in their place.

    Args:
        group: A group with every common option and every option of its rule. Other keys are not looked at.
        where: The group, for error messages.

    Raises:
        ValueError: Naming the group and the option, if a value is missing, has the wrong type or is out of range.
    """
    rule = get_rule(group["rule"])
    rule.options({key: group[key] for key in _rule_options(rule)}, where=where)
    lr = group.get("lr")
    if lr is None:
        raise ValueError(f"{where} has no 'lr'; learning rates of different rules have no common default")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr is a tensor of shape {tuple(lr.shape)}; a learning rate is one number")
    for key in ("lr", "weight_decay"):
        if not is_rate(group[key]):
            raise ValueError(f"{where}: {key}={group[key]!r} {A_RATE}")
    if not isinstance(group["role"], str):
        raise ValueError(f"{where}: role={group['role']!r} must be a text")
    for key in ("cautious_weight_decay", "skip_zero_grad_rows"):
        if not isinstance(group[key], bool):
            raise ValueError(f"{where}: {key}={group[key]!r} must be true or false")
    if not isinstance(group["weight_rounding"], str) or group["weight_rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f"{where}: weight_rounding={group['weight_rounding']!r} is not 'nearest' or 'stochastic'")
    for key in ("padding_rows", "rounding_seed", "rounding_step"):
        if not isinstance(group[key], int) or isinstance(group[key], bool) or group[key] < 0:
            raise ValueError(f"{where}: {key}={group[key]!r} must be a whole number, 0 or more")
    if not isinstance(group["strategy"], str) or group["strategy"] not in ("auto", "local", "reduce", "owner"):
        raise ValueError(f"{where}: strategy={group['strategy']!r} is not 'auto', 'local', 'reduce' or 'owner'")


def is_rate(value: Any) -> bool:
    """Return whether a value is a learning rate or decay.

    Args:
        value: The value of the option.

    Returns:
        Whether it is a number of 0 or more, or a tensor of one, that float32 can step weights by.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return False
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and 0 <= value <= _RATE


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
    pairs = [item for item in params if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)]
    if pairs and len(pairs) < len(params):
        unnamed = next(type(item).__name__ for item in params if not isinstance(item, tuple))
        raise ValueError(
            f"'params' mixes (name, parameter) pairs, the first of them {pairs[0][0]!r}, with a {unnamed} without a "
            "name; give only pairs, or only parameters"
        )
    names = [name for name, _ in pairs] or list(group.get("param_names") or ())
    params = [parameter for _, parameter in pairs] or params
    if not all(isinstance(parameter, Tensor) for parameter in params):
        raise ValueError("'params' must be parameters, or (name, parameter) pairs")
    return names, params


def check_unchanged(groups: Sequence[Mapping[str, Any]], specs: Iterable[ParamSpec]) -> None:
    """Check that no option that is fixed at construction has been changed in a group since.

    Args:
        groups: The optimizer's param groups.
        specs: The descriptions of its parameters.

    Raises:
        ValueError: Naming the group and the options, which the step would ignore.
    """
    stacks = {spec.group: spec.stack for spec in members_of(specs) if spec.stack is not None}
    for i, stack in stacks.items():
        group = groups[i]
        fixed = {
            **dict(stack.options),
            "padding_rows": stack.padding_rows,
            "skip_zero_grad_rows": stack.skip_zero_grad_rows,
        }
        changed = [key for key, value in fixed.items() if group[key] != value]
        if changed:
            raise ValueError(
                f"param group {group['role'] or group['param_names'][0]!r}: {', '.join(changed)} changed after "
                "construction; build another optimizer and load_state_dict into it"
            )
