"""Saved state in each of its forms: matched to an optimizer's parameters, checked, and only then loaded."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symdist.layouts import local
from symdist.layouts.fsdp1 import is_flattened
from symdist.param_groups import ParamSpec
from symdist.param_names import plain_name
from symdist.rules import get_rule

_UNNAMED = re.compile(r"param_\d+$")
_REMEDY = "Build the optimizer with the recipe of the saved run"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What is to be loaded: the options of each group, the state of each parameter in order, empty where none is."""

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
    """Match a state dict to `groups`, whose parameters have `names`.

    It may be raw, as `Optimizer.state_dict` gives it; by names, as `torch.distributed.checkpoint.state_dict` does; or
    flattened, with one key for each value. Wrappers in names do not count. Without `strict` parameters that it knows
    nothing of have empty state, and what it knows of others is left out. `matched` says that PyTorch has put it in the
    order of `groups` already, by the model's own names.

    Raises ValueError for another form, and, naming the parameters or the group, for what does not match.
    """
    if "param_groups" not in state_dict or "state" not in state_dict:
        state_dict = _nested(state_dict)
    saved, states = state_dict["param_groups"], state_dict["state"]
    keys = [key for group in saved for key in group["params"]]
    if any(isinstance(key, str) for key in keys):
        theirs = [plain_name(str(key)) for key in keys]
    else:
        theirs = [plain_name(str(name)) for group in saved for name in _names_of(group)]
    mine = [plain_name(name) for of_group in names for name in of_group]
    alike = [len(group["params"]) for group in saved] == [len(of_group) for of_group in names]
    unnamed = any(_UNNAMED.match(name) for name in (*mine, *theirs)) or len(set(theirs)) < len(keys)
    if unnamed or (alike and (matched or theirs == mine)):
        # Their order tells which is which.
        if matched and not strict:
            saved = [each if "rule" in each else {**own, **each} for own, each in zip(groups, saved, strict=True)]
        check_groups(groups, saved)
        return Saved(groups=list(saved), states=[states.get(key, {}) for key in keys])
    _check_names(mine, theirs, strict=strict)
    of_key = {key: group for group in saved for key in group["params"]}
    by_name = {name: (of_key[key], states.get(key, {})) for name, key in zip(theirs, keys, strict=True)}
    chosen: list[Mapping[str, Any]] = []
    for of_group, group in zip(names, groups, strict=True):
        found = [by_name[plain_name(name)][0] for name in of_group if plain_name(name) in by_name]
        for name, its_group in zip(of_group, found, strict=False):
            check_options(group, its_group, name)
        chosen.append(found[0] if found else group)
    return Saved(groups=chosen, states=[by_name[name][1] if name in by_name else {} for name in mine])


def load_state(
    specs: Sequence[ParamSpec],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    matched: bool,
) -> bool:
    """Write a state dict into groups and state, in place; tensors keep dtype and device.

    Args:
        specs: The optimizer's parameters.
        groups: Its param groups; all keys but parameters and names are taken over.
        state: Its state by parameter.
        state_dict: What was saved, in any form that `read_saved` takes.
        strict: Whether it is an error that nothing was saved of a parameter.
        matched: See `read_saved`.

    Returns:
        Whether any tensor was written.

    Raises:
        ValueError: By name and before anything changes, where groups, rules or state do not match.
    """
    names = [group["param_names"] for group in groups]
    saved = read_saved(groups, names, state_dict, strict=strict, matched=matched)
    pairs: list[tuple[Tensor, Tensor]] = []
    for spec, theirs in zip(specs, saved.states, strict=True):
        mine = state[spec.parameter]
        # Flattened state has empty values for what was not saved; `set_state_dict` leaves out what is frozen here.
        theirs = {key: value for key, value in theirs.items() if as_tensor(value) is not None}
        # Of a parameter that FSDP1 has no piece of here, it has no state here either.
        nothing = is_flattened(spec.parameter) and spec.parameter.numel() == 0
        if theirs or (strict and spec.parameter.requires_grad and not nothing):
            check_state(spec.name, mine, theirs)
            pairs += [(tensor, value) for key, tensor in mine.items() if (value := as_tensor(theirs[key])) is not None]
    for group, theirs in zip(groups, saved.groups, strict=True):
        # Names are not loaded: the saved ones may be those of a pipeline stage.
        group.update({key: value for key, value in theirs.items() if key not in ("params", "param_names")})
    # A trainer may load what it has just been given: then there is nothing to write.
    written = [(tensor, value) for tensor, value in pairs if value is not tensor]
    with torch.no_grad():
        for tensor, value in written:
            local(tensor).copy_(local(value))
    return bool(written)


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where saved param groups differ from `groups` in number, rule, parameters or what a rule goes by."""
    if len(saved) != len(groups):
        raise ValueError(f"the saved state has {len(saved)} param groups, this optimizer {len(groups)}. {_REMEDY}")
    for mine, theirs in zip(groups, saved, strict=True):
        if theirs.get("rule") != mine["rule"] or len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"param group {_label(mine)} has rule {mine['rule']!r} and "
                f"{len(mine['params'])} parameters; the saved one has {theirs.get('rule')!r} and "
                f"{len(theirs['params'])}. {_REMEDY}"
            )
        check_options(mine, theirs, f"param group {_label(mine)}")


def check_options(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """ValueError where a saved group has another rule, or other options that the state hangs on."""
    fixed = {"rule", "view", "skip_zero_grad_rows", "padding_rows", *get_rule(mine["rule"]).defaults}
    changed = sorted(key for key in fixed if key in theirs and theirs[key] != mine[key])
    if changed:
        raise ValueError(
            f"{where}: the saved run had {', '.join(f'{key}={theirs[key]!r}' for key in changed)}, this one has "
            f"{', '.join(f'{key}={mine[key]!r}' for key in changed)}. {_REMEDY}"
        )


def check_state(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """ValueError, naming the parameter, where saved state lacks something or has another shape."""
    for key, tensor in mine.items():
        found = as_tensor(theirs.get(key))
        if found is None:
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has none. "
                "load_state_dict(…, strict=False), or StateDictOptions(strict=False), leaves its state as it is"
            )
        if tuple(found.shape) != tuple(tensor.shape):
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has shape "
                f"{tuple(found.shape)}"
            )
        if local(found).shape != local(tensor).shape:
            raise ValueError(
                f"{name}: state {key!r} was saved in pieces of {tuple(local(found).shape)}, this rank holds "
                f"{tuple(local(tensor).shape)}; load it through torch.distributed.checkpoint, which re-shards"
            )


def as_tensor(value: Any) -> Tensor | None:
    """A saved value, which may be a plain number, as a tensor; None for what is no value."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(float(value)) if isinstance(value, int | float) else None


def flattened_zeros(
    specs: Sequence[ParamSpec], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """For each parameter of an FSDP1 unit, by index, a zero of its shape for each state that others have and it lacks.

    They take no memory: each is one number, expanded.
    """
    pieces = [i for i, spec in enumerate(specs) if is_flattened(spec.parameter)]
    names = {key for i in pieces for key in state[specs[i].parameter]} - {"step"}
    found = {}
    for i in pieces:
        zero = torch.zeros(1, dtype=specs[i].dtype, device=specs[i].parameter.device)
        absent = names - set(state[specs[i].parameter])
        found[i] = dict.fromkeys(sorted(absent), zero.expand(specs[i].parameter.shape))
    return found


def asked_by_pytorch() -> bool | None:
    """Whether PyTorch's `set_optimizer_state_dict` was called strictly, where that is what loads; else None.

    It does not hand this on, and what it hands over is the same either way: of a parameter without state, nothing, or
    of flattened state empty values.
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
    """Flattened state, `state.NAME.KEY` and `param_groups.NAME.KEY`, by names, each a group of its own."""
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = str(key).partition(".")
        name, _, word = rest.rpartition(".")
        if kind not in ("state", "param_groups") or not name:
            raise ValueError(
                f"the saved state has a key {key!r}; symdist loads what Optimizer.state_dict gave, or "
                "torch.distributed.checkpoint.state_dict, flattened or not"
            )
        (states if kind == "state" else groups).setdefault(name, {})[word] = value
    return {
        "state": states,
        "param_groups": [{**groups.get(name, {}), "params": [name]} for name in dict.fromkeys([*groups, *states])],
    }


def _names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    names = group.get("param_names") or ()
    # Those of another number of parameters are another rank's, as of a stage of a pipeline.
    return names if len(names) == len(group["params"]) else [f"param_{i}" for i in range(len(group["params"]))]


def _check_names(mine: Sequence[str], theirs: Sequence[str], *, strict: bool) -> None:
    missing = [name for name in mine if name not in set(theirs)]
    more = [name for name in theirs if name not in set(mine)]
    if not strict or not (missing or more):
        return
    said = [f"nothing of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"] if missing else []
    said += [f"state of {', '.join(more[:5])}{' and others' if len(more) > 5 else ''}, not here"] if more else []
    raise ValueError(
        f"the saved state has {' and '.join(said)}. load_state_dict(…, strict=False) loads what both have and leaves "
        "other state as it is"
    )


def _label(group: Mapping[str, Any]) -> str:
    return repr(group["role"] or group["param_names"][0])
