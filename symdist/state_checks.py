"""Loading of saved state. A state dict is matched to the parameters and checked before anything is changed."""

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symdist.layouts import local
from symdist.layouts.fsdp1 import is_flattened
from symdist.matrix_views import plain_view
from symdist.param_groups import check_values
from symdist.param_names import plain_name
from symdist.param_specs import ParamSpec
from symdist.rules import get_rule

_UNNAMED = re.compile(r"param_\d+$")
_REMEDY = "Build the optimizer with the recipe of the saved run"
_FORMS = "load a state dict of Optimizer.state_dict or of torch.distributed.checkpoint.state_dict, flattened or not"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_RANGES = {"step": (0.0, math.inf), "exp_avg_sq": (0.0, math.inf), "row_sq": (0.0, math.inf), "rotation": (-1.1, 1.1)}
"""What values state of a name can have; other state is only finite. Outside of it, weights would become NaN."""
_OWN = {"params", "param_names", "state_dtype"}
"""Keys of a group that are not loaded: names may be those of another pipeline stage, and state keeps its dtype."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state dict matched to an optimizer.

    Attributes:
        groups: For each param group of the optimizer, the saved options.
        states: The state of each parameter, in the optimizer's order; empty for a parameter without saved state.
    """

    groups: list[Mapping[str, Any]]
    states: list[Mapping[str, Any]]


def read_saved(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    matched: bool = False,
) -> Saved:
    """Match a state dict to an optimizer's param groups.

    The state dict may have three forms: raw, as from `Optimizer.state_dict`; keyed by names, as from
    `torch.distributed.checkpoint.state_dict`; or flattened, with one key per value. Parts of names that wrappers add
    are ignored, see `plain_name`.

    Args:
        groups: The optimizer's param groups.
        names: The names of the parameters of each group.
        state_dict: The saved state.
        strict: Whether the optimizer and the saved state must have the same parameters. If False, parameters without
            saved state get empty state, and the saved state of other parameters is ignored.
        matched: Whether PyTorch has already arranged the state dict in the order of `groups`, by the model's own names.
            False by default.

    Returns:
        The matched state.

    Raises:
        ValueError: If the state dict has another form; or, naming the parameters or the group, if something does not
            match.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the saved state is a {type(state_dict).__name__}, not a dict; {_FORMS}")
    if "param_groups" not in state_dict or "state" not in state_dict:
        state_dict = _nested(state_dict)
    _check_form(state_dict, strict=strict)
    saved, states = state_dict["param_groups"], state_dict["state"]
    keys = [key for group in saved for key in group["params"]]
    if any(isinstance(key, str) for key in keys):
        saved_names = [plain_name(str(key)) for key in keys]
    else:
        saved_names = [plain_name(str(name)) for group in saved for name in _names_of(group)]
    own_names = [plain_name(name) for group_names in names for name in group_names]
    same_sizes = [len(group["params"]) for group in saved] == [len(group_names) for group_names in names]
    unnamed = any(_UNNAMED.match(name) for name in (*own_names, *saved_names)) or len(set(saved_names)) < len(keys)
    if unnamed or (same_sizes and (matched or saved_names == own_names)):
        # Match by order.
        if matched and not strict:
            pairs = zip(groups, saved, strict=True)
            saved = [theirs if "rule" in theirs else {**mine, **theirs} for mine, theirs in pairs]
        check_groups(groups, saved)
        return Saved(groups=list(saved), states=[states.get(key, {}) for key in keys])
    _check_names(own_names, saved_names, strict=strict)
    group_by_key = {key: group for group in saved for key in group["params"]}
    by_name = {name: (group_by_key[key], states.get(key, {})) for name, key in zip(saved_names, keys, strict=True)}
    matching: list[Mapping[str, Any]] = []
    for group_names, group in zip(names, groups, strict=True):
        saved_groups = {name: by_name[plain_name(name)][0] for name in group_names if plain_name(name) in by_name}
        for name, saved_group in saved_groups.items():
            check_options(group, saved_group, name)
        matching.append(next(iter(saved_groups.values()), group))
    return Saved(groups=matching, states=[by_name[name][1] if name in by_name else {} for name in own_names])


def load_state(
    specs: Sequence[ParamSpec],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    matched: bool,
) -> bool:
    """Load a state dict into param groups and state, in place.

    Tensors keep their dtype and device.

    Args:
        specs: The optimizer's parameters.
        groups: The optimizer's param groups. All saved keys except "params" and "param_names" are written to them.
        state: The optimizer's state, by parameter.
        state_dict: The saved state, in any form that `read_saved` accepts.
        strict: Whether to raise an error if a trainable parameter has no saved state; see also `read_saved`.
        matched: See `read_saved`.

    Returns:
        Whether any tensor was written.

    Raises:
        ValueError: Naming the group or parameter, if groups, rules or state do not match. Nothing has been changed
            then.
    """
    names = [group["param_names"] for group in groups]
    saved = read_saved(groups, names, state_dict, strict=strict, matched=matched)
    pairs: list[tuple[Tensor, Tensor]] = []
    for group, theirs in zip(groups, saved.groups, strict=True):
        _check_values(group, theirs)
    for spec, theirs in zip(specs, saved.states, strict=True):
        mine = state[spec.parameter]
        # Flattened state has empty values where nothing was saved, and `set_state_dict` leaves out frozen parameters.
        theirs = {key: value for key, value in theirs.items() if as_tensor(value) is not None}
        # FSDP1 saves no state on this rank for a parameter if this rank holds no piece of it.
        no_piece = is_flattened(spec.parameter) and spec.parameter.numel() == 0
        if theirs or (strict and spec.parameter.requires_grad and not no_piece):
            check_state(spec.name, mine, theirs)
            pairs += [(tensor, value) for key, tensor in mine.items() if (value := as_tensor(theirs[key])) is not None]
    for group, theirs in zip(groups, saved.groups, strict=True):
        group.update({key: value for key, value in theirs.items() if key not in _OWN})
    # A trainer may load the same tensor objects that the optimizer returned. Then there is nothing to write.
    written = [(tensor, value) for tensor, value in pairs if value is not tensor]
    with torch.no_grad():
        for tensor, value in written:
            local(tensor).copy_(local(value))
    return bool(written)


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Check that saved param groups fit the optimizer's.

    Args:
        groups: The optimizer's param groups.
        saved: The saved param groups, in the same order.

    Raises:
        ValueError: If the number of groups differs, or if a group differs in its rule, its number of parameters, or
            options that the state depends on.
    """
    if len(saved) != len(groups):
        raise ValueError(f"the saved state has {len(saved)} param groups, this optimizer {len(groups)}. {_REMEDY}")
    for mine, theirs in zip(groups, saved, strict=True):
        if _differs(theirs.get("rule"), mine["rule"]) or len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"param group {_label(mine)} has rule {mine['rule']!r} and "
                f"{len(mine['params'])} parameters; the saved one has {theirs.get('rule')!r} and "
                f"{len(theirs['params'])}. {_REMEDY}"
            )
        check_options(mine, theirs, f"param group {_label(mine)}")


def check_options(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Check that a saved param group has the same rule and the same options that the state depends on.

    Args:
        mine: The optimizer's param group.
        theirs: The saved param group. Keys that it lacks are not compared.
        where: The group or parameter; error messages start with it.

    Raises:
        ValueError: If the rule or one of these options differs.
    """
    fixed = {"rule", "view", "skip_zero_grad_rows", "padding_rows", *get_rule(mine["rule"]).defaults}
    changed = sorted(key for key in fixed if key in theirs and _differs(plain_view(theirs[key]), plain_view(mine[key])))
    if changed:
        raise ValueError(
            f"{where}: the saved run had {', '.join(f'{key}={theirs[key]!r}' for key in changed)}, this one has "
            f"{', '.join(f'{key}={mine[key]!r}' for key in changed)}. {_REMEDY}"
        )


def check_state(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Check that saved state has every tensor of a parameter's state, in the same whole and local shape, and finite.

    Args:
        name: The parameter's name, for error messages.
        mine: The optimizer's state of the parameter.
        theirs: The saved state. Keys that `mine` lacks are ignored.

    Raises:
        ValueError: If a tensor is missing, has a different shape, or has values that no training gives.
    """
    for key, tensor in mine.items():
        saved = as_tensor(theirs.get(key))
        if saved is None:
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has none. "
                "To leave its state unchanged, use load_state_dict(…, strict=False) or StateDictOptions(strict=False)"
            )
        if tuple(saved.shape) != tuple(tensor.shape):
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has shape "
                f"{tuple(saved.shape)}"
            )
        if local(saved).shape != local(tensor).shape:
            raise ValueError(
                f"{name}: state {key!r} was saved in pieces of shape {tuple(local(saved).shape)}, but this rank holds "
                f"{tuple(local(tensor).shape)}; load it through torch.distributed.checkpoint, which reshards it"
            )
        _check_numbers(name, key, saved)


def as_tensor(value: Any) -> Tensor | None:
    """Convert a saved value to a tensor.

    Args:
        value: The saved value.

    Returns:
        The tensor, if the value is a tensor or a plain number; otherwise None.
    """
    if isinstance(value, Tensor):
        return value
    # A whole number may be too large for a float.
    limit = sys.float_info.max
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(float(max(-limit, min(value, limit)))) if is_number else None


def flattened_zeros(
    specs: Sequence[ParamSpec], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """Make zeros for state that some parameters of FSDP1 units have and others lack, except for "step".

    Args:
        specs: The optimizer's parameters.
        state: The optimizer's state, by parameter.

    Returns:
        For each parameter of an FSDP1 unit, by index, the zeros by state name, in the parameter's shape. Each tensor is
        a single number, expanded, so it takes almost no memory.
    """
    pieces = [i for i, spec in enumerate(specs) if is_flattened(spec.parameter)]
    names = {key for i in pieces for key in state[specs[i].parameter]} - {"step"}
    zeros = {}
    for i in pieces:
        zero = torch.zeros(1, dtype=specs[i].dtype, device=specs[i].parameter.device)
        absent = names - set(state[specs[i].parameter])
        zeros[i] = dict.fromkeys(sorted(absent), zero.expand(specs[i].parameter.shape))
    return zeros


def asked_by_pytorch() -> bool | None:
    """Return whether PyTorch's `set_optimizer_state_dict`, if it is the caller, loads strictly.

    This looks for PyTorch's function on the call stack. PyTorch does not pass `strict` on, and what it does pass is the
    same in both cases: nothing for a parameter without state or, for flattened state, empty values.

    Returns:
        The `strict` that PyTorch's function was called with; None if that function is not on the call stack.
    """
    frame = sys._getframe(2)
    for _ in range(4):
        strict = getattr(frame.f_locals.get("info"), "strict", None)
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict" and strict is not None:
            return bool(strict)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn flattened keys, `state.NAME.KEY` and `param_groups.NAME.KEY`, into a nested state dict.

    Returns:
        A state dict with one param group per name.
    """
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, path = str(key).partition(".")
        name, _, word = path.rpartition(".")
        if kind not in ("state", "param_groups") or not name:
            raise ValueError(f"the saved state has a key {key!r}; {_FORMS}")
        (states if kind == "state" else groups).setdefault(name, {})[word] = value
    return {
        "state": states,
        "param_groups": [{**groups.get(name, {}), "params": [name]} for name in dict.fromkeys([*groups, *states])],
    }


def _check_form(state_dict: Mapping[str, Any], *, strict: bool) -> None:
    """Check the types of everything in a nested state dict besides the values of options and of state."""

    def refuse(what: str, value: Any, expected: str) -> None:
        raise ValueError(f"{what} of the saved state is a {type(value).__name__}, not {expected}; {_FORMS}")

    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list | tuple):
        refuse("'param_groups'", groups, "a list")
    for i, group in enumerate(groups):
        where = f"'param_groups'[{i}]"
        if not isinstance(group, Mapping):
            refuse(where, group, "a dict")
        for key in group:
            if not isinstance(key, str):
                refuse(f"the key {key!r} in {where}", key, "a text")
        for key in ("params", "param_names"):
            values = group.get(key, None if key == "params" else ())
            if not isinstance(values, list | tuple):
                refuse(f"{key!r} of {where}", values, "a list")
            for value in values:
                if not isinstance(value, int | str) or isinstance(value, bool):
                    refuse(f"an entry of {key!r} of {where}", value, "an index or a name")
    if not isinstance(states, Mapping):
        refuse("'state'", states, "a dict")
    listed = [key for group in groups for key in group["params"]]
    twice = [key for key, count in Counter(listed).items() if count > 1]
    if twice:
        raise ValueError(f"the saved state lists {twice[0]!r} more than once in its param groups")
    known = set(listed)
    for key, state in states.items():
        if not isinstance(state, Mapping):
            refuse(f"'state'[{key!r}]", state, "a dict")
        for name, value in state.items():
            # What was not saved may be empty, see `load_state`.
            if as_tensor(value) is None and not (value is None or (isinstance(value, Mapping) and not value)):
                refuse(f"{name!r} of 'state'[{key!r}]", value, "a tensor or a number")
        if strict and key not in known:
            raise ValueError(f"the saved state has state for {key!r}, which none of its param groups lists")


def _check_values(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Check what a saved param group would write to the optimizer's, as at construction."""
    where = f"param group {_label(mine)} of the saved state"
    check_values({**mine, **{key: value for key, value in theirs.items() if key not in _OWN}}, where)
    for key, value in theirs.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {key}={value!r} must be finite")


def _check_numbers(name: str, key: str, saved: Tensor) -> None:
    """Check the dtype and the values of saved state, of which this reads a few numbers."""
    values = local(saved.detach())
    if values.layout != torch.strided or not (values.dtype in _FLOATS or (key == "step" and values.dtype in _INTEGERS)):
        kind = f"{values.dtype} and {values.layout}"
        raise ValueError(f"{name}: state {key!r} of the saved state is {kind}, not a dense tensor of numbers")
    if values.is_meta or not values.numel():
        return
    low, high = _RANGES.get(key, (-math.inf, math.inf))
    least, most = (float(value) for value in values.aminmax())
    # Both are NaN if any element is.
    if not (math.isfinite(least) and math.isfinite(most) and low <= least and most <= high):
        bounds = f" and in [{low:g}, {high:g}]" if key in _RANGES else ""
        raise ValueError(
            f"{name}: state {key!r} of the saved state has values from {least:g} to {most:g}; they must be finite"
            + bounds
        )


def _differs(one: Any, other: Any) -> bool:
    """Return whether two values of an option differ; a tensor or an array never equals one of ours."""
    try:
        return bool(one != other)
    except (RuntimeError, TypeError, ValueError):
        return True


def _names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    names = group.get("param_names") or ()
    # If their number differs, the names come from another rank, such as one of another pipeline stage.
    return names if len(names) == len(group["params"]) else [f"param_{i}" for i in range(len(group["params"]))]


def _check_names(mine: Sequence[str], theirs: Sequence[str], *, strict: bool) -> None:
    missing = [name for name in mine if name not in set(theirs)]
    more = [name for name in theirs if name not in set(mine)]
    if not strict or not (missing or more):
        return
    faults = [f"nothing for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"] if missing else []
    faults += [f"state for {', '.join(more[:5])}{' and others' if len(more) > 5 else ''}, not here"] if more else []
    raise ValueError(
        f"the saved state has {' and '.join(faults)}. load_state_dict(…, strict=False) loads the state of parameters "
        "that both have, and leaves other state unchanged"
    )


def _label(group: Mapping[str, Any]) -> str:
    return repr(group["role"] or group["param_names"][0])
